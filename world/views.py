"""What can be seen of each thing, measured in the rendering."""

from dataclasses import dataclass

import numpy as np

from .scene import Scene

SMALLEST = 0.0035  # share of the picture from which a thing can be asked about
LEAST_VISIBLE = 0.6  # share of a thing that must not be hidden or cut off
SAMPLES = 64


@dataclass
class View:
    """One thing in the picture.  `clear` things are asked about; of others that show at all, nothing may depend."""

    index: int
    noun: str
    colour: str
    pattern: str
    mask: np.ndarray  # bool[H, W]
    pixels: int
    x: float  # of its middle, share of the width
    y: float
    near: float  # metres along the axis: a tenth of its pixels is nearer
    middle: float  # half of them
    far: float  # nine tenths
    clear: bool
    patterned: bool  # large enough for its pattern to be seen


def thing_map(scene: Scene) -> np.ndarray:
    """int32[H, W]: the index of the thing in each pixel, -1 for the place itself and the sky."""
    return np.append(scene.geometry.thing_of, -1)[scene.rendering.piece]


def inverse_depth(metres: np.ndarray) -> np.ndarray:
    """Depth float32[H, W] → relative inverse depth: 1 at the nearest pixel, 0 in the sky or at the farthest."""
    values = 1 / metres
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, np.float32(1e-12))


def views(scene: Scene) -> list[View]:
    """Every thing that shows at all, by size."""
    things, depth = thing_map(scene), scene.rendering.depth.ravel()
    height, width = things.shape
    flat = things.ravel().astype(np.int16)
    order = np.argsort(flat, kind="stable")  # the pixels of each thing side by side
    ends = np.cumsum(np.bincount(flat + 1, minlength=len(scene.things) + 1))
    counts = np.diff(ends)
    pieces = {piece.thing: piece for piece in scene.geometry.pieces if piece.thing >= 0}
    found = []
    for index in np.argsort(-counts, kind="stable"):
        pixels = int(counts[index])
        if not pixels:
            break
        thing, own = scene.things[index], order[ends[index] : ends[index + 1]]
        rows, columns = np.divmod(own, width)
        near, middle, far = np.sort(depth[own])[[pixels // 10, pixels // 2, pixels * 9 // 10]]
        share = pixels / (height * width)
        clear = share >= SMALLEST and visible_share(scene, pieces[index], things) >= LEAST_VISIBLE
        found.append(
            View(
                int(index),
                thing.noun,
                thing.colour,
                thing.pattern,
                things == index,
                pixels,
                float(columns.mean() / width),
                float(rows.mean() / height),
                float(near),
                float(middle),
                float(far),
                bool(clear and thing.noun not in scene.taken),
                share >= 3 * SMALLEST,
            )  # fmt: skip
        )
    return found


def visible_share(scene: Scene, piece, things: np.ndarray) -> float:
    """Share of the side that faces the camera which is neither hidden by others nor outside the picture."""
    height, width = things.shape
    faces = piece.mesh.faces
    chosen = faces[np.linspace(0, len(faces) - 1, min(len(faces), SAMPLES)).astype(int)]
    corners = piece.vertices()[chosen].astype(np.float64)
    weights = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    points = np.einsum("wc,ncd->wnd", weights, corners).reshape(-1, 3)
    area = np.tile(np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1), 3)
    x, y, z = scene.camera.project(points)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z > 0)
    seen = np.zeros(len(points), bool)
    seen[inside] = things[y[inside].astype(int), x[inside].astype(int)] == piece.thing
    return float((seen * area).sum() / max(area.sum(), 1e-12))
