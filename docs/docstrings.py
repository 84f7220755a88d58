"""Our docstrings say `name: what it is` on lines of their own; on a page such lines become a list."""

import re

from griffe import Extension

ENTRY = re.compile(r"((?:`?[a-z_]\w*`?(?: \([^)]*\))?(?:, )?)+): (?=\S)")


def as_markdown(text: str) -> str:
    lines, listed = [], False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        entry = ENTRY.match(line.strip()) if line.strip() and not line.strip().startswith(">>>") else None
        if entry and indent <= 4:
            if not listed and lines and lines[-1].strip():
                lines.append("")
            lines.append(f"- `{entry[1].replace('`', '')}`: {line.strip()[entry.end() :]}")
            listed = True
        elif listed and line.strip():
            lines.append(f"    {line.strip()}")
        else:
            lines.append(line)
            listed = False
    return "\n".join(lines)


class Docstrings(Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
