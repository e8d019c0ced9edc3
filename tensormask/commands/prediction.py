"""What `predict` does with its inputs: detect, and write drawings, videos, results and labels."""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tensormask.commands.inputs import Input
from tensormask.data.large_images import open_large_image
from tensormask.detections import Detections
from tensormask.evaluation.results import ResultsWriter
from tensormask.input_image import read_input
from tensormask.predictor import Predictor
from tensormask.utils.errors import UserError
from tensormask.utils.video import VideoError, VideoReader, VideoWriter
from tensormask.visualization.instances import unique_stem

logger = logging.getLogger("tensormask.commands.predict")


def output_stems(inputs: list[Input], output: Path, kinds: set[str]) -> list[str]:
    """Return a name for the files of each input, all different.

    Raises:
        UserError: a file of these kinds would overwrite an input; nothing has been written.
    """
    taken: set[str] = set()
    stems = [unique_stem(source.stem, taken) for source in inputs]
    names = {"image": "{}.png", "video": "{}.mp4", "labels": "labels/{}.png"}
    written = [output / names[kind].format(stem) for kind in kinds & {*names} for stem in stems]
    read = {source.location.resolve() for source in inputs if isinstance(source.location, Path)}
    if overwritten := read & {file.resolve() for file in written}:
        raise UserError(
            f"drawings would overwrite the inputs, such as {min(overwritten)}: "
            "give another folder as --output"
        )
    return stems


class _StoppedError(Exception):
    """Ctrl-C between two tiles of an image, which is left out."""


@dataclass
class InputProcessor:
    """Detects objects in inputs one after the other, and writes what is to be saved.

    Attributes:
        results: the writer of the COCO results, or None.
        stop: set to stop after the images that have been read, or the tile of a large one.
        tile: larger images are cut into tiles of this side in pixels; None for whole images.
        overlap: of neighboring tiles in pixels.
    """

    predictor: Predictor
    options: dict[str, Any]
    output: Path
    kinds: set[str]
    results: ResultsWriter | None
    progress: tqdm
    stop: threading.Event
    tile: int | None = None
    overlap: int = 0
    num_images: int = 0  # and frames, also those that cannot be read: the next image_id
    num_read: int = 0
    num_detections: int = 0
    num_unread: int = 0

    def process(self, inputs: list[Input], stems: list[str]) -> None:
        """Process inputs, each with the stem of its output files, until `stop` is set."""
        pairs = zip(inputs, stems, strict=True)
        for is_video, group in groupby(pairs, key=lambda pair: pair[0].is_video):
            if not is_video:
                process = self._process_images if self.tile is None else self._process_tiled
                process(group)
                continue
            for source, stem in group:
                if not self.stop.is_set():
                    self._process_video(source, stem)

    def _process_images(self, pairs: Iterator[tuple[Input, str]]) -> None:
        read: deque[tuple[int, Input, str]] = deque()  # images without results yet

        def images() -> Iterator[np.ndarray]:
            for source, stem in pairs:
                if self.stop.is_set():
                    return
                self.num_images += 1
                try:
                    rgb = read_input(source.location)
                except (UserError, OSError) as error:
                    self._report(error)
                    continue
                read.append((self.num_images - 1, source, stem))
                yield rgb

        for detections in self.predictor(images(), **self.options):
            self._save_image(detections, *read.popleft())

    def _process_tiled(self, pairs: Iterator[tuple[Input, str]]) -> None:
        for source, stem in pairs:
            if self.stop.is_set():
                return
            self.num_images += 1
            try:
                detections = self._detect_tiled(source)
            except _StoppedError:
                return
            except (UserError, OSError) as error:
                self._report(error)
                continue
            self._save_image(detections, self.num_images - 1, source, stem)

    def _detect_tiled(self, source: Input) -> Detections:
        assert self.tile is not None
        is_file = isinstance(source.location, Path)
        image = open_large_image(source.location if is_file else read_input(source.location))
        height, width = image.size
        if max(height, width) <= self.tile:
            (detections,) = self.predictor([image.read(0, height, 0, width)], **self.options)
            return detections
        side = (min(self.tile, height), min(self.tile, width))
        resized = self.predictor.transform.draw(side, np.random.default_rng(0)).new_size
        logger.info(
            "%s: %d x %d pixels in tiles of %d x %d, for the model resized to %d x %d "
            "(INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST)",
            *(source.location, *image.size, *side, *resized),
        )

        def on_tiles(num_done: int, num_tiles: int) -> None:
            self.progress.set_postfix(tiles=f"{num_done}/{num_tiles}")
            if self.stop.is_set() and num_done < num_tiles:
                raise _StoppedError

        return self.predictor.predict_tiled(
            image, tile=self.tile, overlap=self.overlap, on_tiles=on_tiles, **self.options
        )

    def _process_video(self, source: Input, stem: str) -> None:
        def frames() -> Iterator[np.ndarray]:
            try:
                for rgb in reader:
                    yield rgb
                    if self.stop.is_set():
                        return
            except VideoError as error:
                self._report(error)

        with ExitStack() as stack:
            try:
                reader = stack.enter_context(VideoReader(source.location))
            except VideoError as error:
                self._report(error)
                return
            if self.progress.total is not None:
                more = reader.num_frames - 1
                self.progress.total = self.progress.total + more if more >= 0 else None
            writer = None
            if "video" in self.kinds:
                writer = stack.enter_context(VideoWriter(self.output / f"{stem}.mp4", reader.fps))
            options = self.options
            if isinstance(source.location, int):  # the frames of a camera come one by one
                options = {**options, "batch_size": 1}
            for number, detections in enumerate(self.predictor(frames(), **options)):
                self.num_images += 1
                if writer is not None:
                    # A color per class: rows, and so their colors, change from frame to frame.
                    writer.write(detections.draw(magnify=1, color_by="class"))
                about = {"file_name": str(source.location), "frame": number}
                self._save(detections, self.num_images - 1, about, f"{stem}/{number:06d}")

    def _report(self, error: Exception) -> None:
        """Name an input that cannot be read."""
        logger.error(error)
        self.num_unread += 1

    def _save_image(self, detections: Detections, image_id: int, source: Input, stem: str) -> None:
        if "image" in self.kinds:
            detections.save(self.output / f"{stem}.png")
        self._save(detections, image_id, {"file_name": str(source.location)}, stem)

    def _save(
        self, detections: Detections, image_id: int, about: dict[str, Any], name: str
    ) -> None:
        """Write what images and frames have in common: COCO results and label images."""
        if self.results is not None:
            for result, class_name in zip(
                detections.to_coco(image_id), detections["class_names"], strict=True
            ):
                self.results.add([result | {"category_name": class_name} | about])
        if "labels" in self.kinds:
            path = self.output / "labels" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(detections.label_image()).save(path)
        self.num_read += 1
        self.num_detections += detections.num_detections
        self.progress.update()
