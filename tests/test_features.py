"""SAM2's features on disk: what is read is what would be computed, and what cannot be read or written is named."""

import copy
import multiprocessing
import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from learning_samples import box, collator_of, inputs_of, load_tiny, record, slope, some_of_each, world
from safetensors.torch import load_file, save_file

from perceptio.data.record import DataError
from perceptio.processing_perceptio import load_picture
from perceptio.training import features
from perceptio.training.adapters import thaw
from perceptio.training.features import FeatureCache, encoder_name, fill_cache, open_cache

Usage = namedtuple("Usage", "total used free")
ALONE = SimpleNamespace(process_index=0, num_processes=1, is_local_main_process=False, wait_for_everyone=lambda: None)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_tiny(tiny_folder())


@pytest.fixture
def cache(tmp_path, tiny):
    return FeatureCache(tmp_path, encoder_name(tiny[0]), torch.float32)


@pytest.fixture
def encoded(tiny, monkeypatch):
    """The number of pictures of each call of SAM2's encoder."""
    calls, encoder = [], tiny[0].mask_model.vision_encoder
    forward = encoder.forward

    def counting(pixels, **kwargs):
        calls.append(len(pixels))
        return forward(pixels, **kwargs)

    monkeypatch.setattr(encoder, "forward", counting)
    return calls


def fill(cache, tiny, records) -> int:
    return fill_cache(cache, records, *tiny, progress=False)


def computed(tiny, one) -> list[torch.Tensor]:
    pixels = torch.from_numpy(tiny[1].sam_pixels(load_picture(one["image"]["bytes"])))
    return [maps[0] for maps in tiny[0].encode_pictures(pixels[None])]


def stored(cache, one):
    return cache.read(cache.key(one["image"]["bytes"]))


def files(cache) -> list:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


MASKED = [record("a", [box(right=30)], depth=slope()), record("b", [box(bottom=9), box(left=40)])]


# What is read is what would be computed


def test_float32_features_are_those_of_the_encoder(cache, tiny):
    assert fill(cache, tiny, MASKED) == 2
    for one in MASKED:
        found = stored(cache, one)
        assert [maps.shape for maps in found] == [(32, 16, 16), (32, 8, 8), (32, 4, 4)]
        assert all(torch.equal(a, b) for a, b in zip(found, computed(tiny, one), strict=True))


def test_bfloat16_features_are_rounded_and_no_more(tmp_path, tiny):
    cache = FeatureCache(tmp_path, encoder_name(tiny[0]))
    fill(cache, tiny, MASKED)
    for a, b in zip(stored(cache, MASKED[0]), computed(tiny, MASKED[0]), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=1e-30)


@pytest.fixture
def thawed(tiny):
    model = copy.deepcopy(tiny[0])
    thaw(model)
    return model


def losses_and_gradients(model, batch):
    output = model(**inputs_of(batch))
    model.zero_grad()
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_batch_learns_the_same_from_features_as_from_pictures(cache, tiny, thawed):
    records = [*some_of_each(), *world()[:2]]
    fill(cache, tiny, records)
    batch = collator_of(*tiny, features=cache)(records)
    assert "sam_pixel_values" not in batch["targets"] and len(batch["targets"]["sam_features"]) == 3
    found, gradients = losses_and_gradients(thawed, batch)
    due, expected = losses_and_gradients(thawed, collator_of(*tiny)(records))
    for term, loss in due.losses.items():
        torch.testing.assert_close(found.losses[term], loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_called_once_for_a_picture_and_never_with_the_cache(cache, tiny, encoded):
    fill(cache, tiny, [*MASKED, *MASKED])
    assert encoded == [1, 1]
    fill(cache, tiny, MASKED)
    tiny[0](**inputs_of(collator_of(*tiny, features=cache)(MASKED)))
    assert encoded == [1, 1]
    tiny[0](**inputs_of(collator_of(*tiny)(MASKED)))
    assert encoded == [1, 1, 2]


def test_rounded_features_change_the_losses_by_their_rounding(tmp_path, tiny):
    cache = FeatureCache(tmp_path, encoder_name(tiny[0]))
    fill(cache, tiny, MASKED)
    found = tiny[0](**inputs_of(collator_of(*tiny, features=cache)(MASKED))).losses
    due = tiny[0](**inputs_of(collator_of(*tiny)(MASKED))).losses
    for term, loss in due.items():
        torch.testing.assert_close(found[term], loss, rtol=0.01, atol=0.01)


# Whose features they are


def test_features_of_another_encoder_or_kind_are_never_read(tmp_path, tiny):
    name = encoder_name(tiny[0])
    fill(FeatureCache(tmp_path, name, torch.float32), tiny, MASKED)
    for other in (FeatureCache(tmp_path, name), FeatureCache(tmp_path, name[::-1], torch.float32)):
        assert stored(other, MASKED[0]) is None
    assert stored(FeatureCache(tmp_path, name, torch.float32), MASKED[0]) is not None


def test_an_encoder_is_known_by_its_weights_whatever_holds_them(tiny):
    name, other = encoder_name(tiny[0]), copy.deepcopy(tiny[0])
    assert encoder_name(other.to(torch.bfloat16)) == name
    other = copy.deepcopy(tiny[0])
    other.lm_head.weight.data += 1
    assert encoder_name(other) == name
    next(other.mask_model.vision_encoder.parameters()).data += 1
    assert encoder_name(other) != name


def test_an_encoder_of_larger_pictures_is_another(tiny):
    """Its weights may be the same, and its maps are not."""
    other = copy.deepcopy(tiny[0])
    other.config.mask_config.vision_config.backbone_config.image_size = [128, 128]
    other.config.mask_config.prompt_encoder_config.image_size = 128
    assert other.config.mask_image_size == 128 and encoder_name(other) != encoder_name(tiny[0])


def test_another_picture_has_another_key(cache):
    keys = {cache.key(one["image"]["bytes"]) for one in some_of_each() if one["image"] is not None}
    assert len(keys) == 6 and cache.key(MASKED[0]["image"]["bytes"]) == cache.key(bytes(MASKED[0]["image"]["bytes"]))


# Filling


def test_only_pictures_with_masks_are_encoded(cache, tiny):
    records = some_of_each()
    assert fill(cache, tiny, records) == sum(bool(one["masks"]) for one in records) == len(files(cache)) == 3


def test_filling_goes_on_where_it_stopped(cache, tiny, encoded, monkeypatch):
    records = [record(name, [box()]) for name in "abcde"]
    write, written = cache.write, []

    def failing(key, maps):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(key, maps)
        written.append(key)

    monkeypatch.setattr(cache, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, tiny, records)
    monkeypatch.undo()
    assert fill(cache, tiny, records) == 3 and len(files(cache)) == 5
    assert fill(cache, tiny, records) == 0


def test_broken_pictures_are_left_to_the_training(cache, tiny):
    records = [record("broken", [box()], image=b"nothing"), record("cut", [box()]), MASKED[0]]
    records[1]["image"]["bytes"] = records[1]["image"]["bytes"][:200]
    assert fill(cache, tiny, records) == 1
    batch = collator_of(*tiny, features=cache, on_error="skip")(records)
    assert batch["sample_ids"] == ["a"] and [entry["id"] for entry in batch["skipped"]] == ["broken", "cut"]
    assert "sam_features" in batch["targets"]


def test_a_picture_that_was_not_filled_in_is_named(cache, tiny):
    fill(cache, tiny, MASKED[:1])
    with pytest.raises(DataError, match="the cache lacks the features of 'b': fill it before training"):
        collator_of(*tiny, features=cache)(MASKED)


def test_processes_share_the_work(tmp_path, tiny, encoded):
    """Each opens the cache with its own part; together they leave none out."""
    datasets = [[record(name, [box()]) for name in "abc"], MASKED]
    for index in range(2):
        state = SimpleNamespace(**{**vars(ALONE), "process_index": index, "num_processes": 2})
        cache = open_cache(tmp_path, *tiny, datasets, state, torch.float32)
    records = {one["image"]["bytes"]: one for part in datasets for one in part}
    assert len(files(cache)) == len(encoded) == len(records)
    assert all(stored(cache, one) is not None for one in records.values())


# Damage


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "no features": lambda path: path.write_bytes(b"\xff" * 500),
    "without a level": lambda path: save_file({"fine": load_file(path)["fine"]}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(cache, tiny, damage):
    fill(cache, tiny, MASKED)
    path = cache.path(cache.key(MASKED[0]["image"]["bytes"]))
    DAMAGE[damage](path)
    with pytest.raises(OSError, match=rf"{path} cannot be read .*: remove it, and it is made again"):
        stored(cache, MASKED[0])
    with pytest.raises(DataError, match=rf"record 'a' cannot be used: {path}"):
        collator_of(*tiny, features=cache)(MASKED)
    path.unlink()
    assert fill(cache, tiny, MASKED) == 1 and stored(cache, MASKED[0]) is not None


def test_an_unfinished_file_is_none(cache, tiny, monkeypatch):
    """Only a whole file gets its name."""

    def half(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, tiny, MASKED)
    assert stored(cache, MASKED[0]) is None
    monkeypatch.undo()
    assert fill(cache, tiny, MASKED) == 2


# Room


def test_a_disk_without_room_is_told_before_the_first_picture(cache, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 << 30, 9 << 30, 300 << 20))
    with pytest.raises(OSError, match="300 MiB left, a picture's features take 0 MiB: name a larger disk"):
        fill(cache, tiny, MASKED)
    assert files(cache) == []


def test_a_disk_that_fills_up_is_one_sentence(cache, tiny, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise RuntimeError("No space left on device (os error 28)")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(OSError) as caught:
        fill(cache, tiny, MASKED)
    message = str(caught.value)
    assert message.startswith(str(cache.folder)) and "cannot be written (No space left on device" in message
    assert "MiB are free: name a larger disk as `sam_cache`" in message and "\n" not in message
    assert files(cache) == []


def test_a_file_in_place_of_the_folder_is_one_sentence(cache):
    cache.folder.parent.mkdir(exist_ok=True)
    cache.folder.write_bytes(b"")
    with pytest.raises(OSError, match="cannot be written .*: name a larger disk"):
        cache.write("0" * 40, [torch.zeros(1)] * 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit is that of a process of its own")
def test_a_file_that_may_not_grow_is_one_sentence_and_leaves_nothing(cache):
    """The system's own refusal in the midst of writing."""

    def write(answer):
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            cache.write("0" * 40, [torch.ones(100, 100)] * 3)
        except OSError as error:
            answer.send(str(error))

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=write, args=(send,))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and "cannot be written" in receive.recv() and files(cache) == []


# Two processes, one picture


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes share what is written by forking")
def test_two_processes_may_write_the_same_picture(cache):
    """A reader sees nothing or a whole file, and in the end there is one."""
    maps = [torch.full((32, side, side), float(side)) for side in (64, 32, 16)]
    key = "ab" * 20

    def write():
        for _ in range(40):
            cache.write(key, maps)

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(2)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        found = cache.read(key)
        if found is not None:
            seen += 1
            assert all(torch.equal(a, b) for a, b in zip(found, maps, strict=True))
    assert [process.exitcode for process in processes] == [0, 0] and seen > 0
    assert files(cache) == [cache.path(key)]
