"""A hook of MkDocs: a page for each notebook of docs/, with its stored outputs."""

import base64
from pathlib import Path

import nbformat
from mkdocs.structure.files import File

IMAGES = {"image/jpeg": "jpg", "image/png": "png"}


def on_files(files, config):
    """Add `tour.md` and its images for `tour.ipynb`."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            name = file.src_uri.removesuffix(".ipynb")
            notebook = nbformat.read(file.abs_src_path, as_version=4)
            page, images = page_of(notebook, Path(name).name)
            files.append(File.generated(config, f"{name}.md", content=page))
            folder = Path(name).parent
            for image, content in images.items():
                files.append(File.generated(config, (folder / image).as_posix(), content=content))
    return files


def page_of(notebook, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the images that it shows."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            kind = next((kind for kind in IMAGES if kind in data), None)
            if kind:
                image = f"{name}_{len(images) + 1}.{IMAGES[kind]}"
                images[image] = base64.b64decode(data[kind])
                parts.append(f"![Output of the cell above]({image})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```{{.text .output}}\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images
