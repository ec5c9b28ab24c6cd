"""Adapters over HTTP: load and unload them by vLLM's routes, and show them among the models.

Only folders below one root can be loaded, symbolic links followed, and only if the server was given a root. What lies
elsewhere cannot be told from what does not exist.
"""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from anabranch.adapters.files import CONFIG, WEIGHTS
from anabranch.serve.adapters.library import AdapterLibrary, NamedAdapter, UnknownAdapter
from anabranch.serve.http.errors import ApiError
from anabranch.serve.http.protocol import LoadAdapterRequest, UnloadAdapterRequest
from anabranch.serve.http.settings import ServerSettings


class AdapterRoutes:
    """The endpoints over one library; None if the model serves no adapters."""

    def __init__(self, library: AdapterLibrary | None, settings: ServerSettings) -> None:
        self.library = library
        self.model_names = settings.model_names
        self.root = None if settings.adapter_root is None else settings.adapter_root.resolve()

    def add_to(self, router: APIRouter) -> None:
        router.post("/v1/load_lora_adapter")(self.load)
        router.post("/v1/unload_lora_adapter")(self.unload)

    async def load(self, body: LoadAdapterRequest) -> Response:
        """Read an adapter and give it a name, to be used as a request's model."""
        library, root = self._allowed()
        if body.lora_name in self.model_names:
            raise ApiError(400, f"{body.lora_name!r} is the model's own name", param="lora_name")
        await asyncio.to_thread(self._load, library, root, body)  # its own threads: others tokenize meanwhile
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    async def unload(self, body: UnloadAdapterRequest) -> Response:
        """Forget an adapter's name. Requests that have it end in peace."""
        library, _ = self._allowed()
        try:
            library.unload(body.lora_name)
        except UnknownAdapter as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    def find(self, name: str) -> NamedAdapter | None:
        """The adapter that a model's name stands for."""
        try:
            return None if self.library is None else self.library.find(name)
        except UnknownAdapter:
            return None

    def names(self) -> list[str]:
        return [] if self.library is None else [named.name for named in self.library.names()]

    def describe(self, named: NamedAdapter) -> dict[str, Any]:
        """What stands in the list of models beside the name: the folder, without what is above the root."""
        inside = self.root is not None and named.folder.is_relative_to(self.root)
        folder = named.folder.relative_to(self.root) if self.root is not None and inside else named.folder.name
        return {"parent": self.model_names[0], "root": str(folder)}

    def _allowed(self) -> tuple[AdapterLibrary, Path]:
        if self.library is None or self.root is None:
            raise ApiError(404, "adapters cannot be loaded or unloaded here; the server has no --adapter-root")
        return self.library, self.root

    def _load(self, library: AdapterLibrary, root: Path, body: LoadAdapterRequest) -> None:
        folder = _below(root, body.lora_path)
        try:
            library.load(body.lora_name, folder, replace=body.load_inplace)
        except (ValueError, OSError) as error:
            raise ApiError(400, str(error).replace(f"{root}/", "")) from None


def _below(root: Path, path: str) -> Path:
    """The folder that is meant, if it and its files lie below the root."""
    try:
        folder = (root / path).resolve(strict=True)
        files = [(folder / name).resolve(strict=True) for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError, RuntimeError):  # not there, not readable, not a path, a loop of links
        files = []
    if not files or not all(place.is_relative_to(root) for place in (folder, *files)):
        raise ApiError(
            404, f"there is no folder {path!r} with {CONFIG} and {WEIGHTS} below the root of adapters",
            param="lora_path", code="adapter_not_found",
        )  # fmt: skip
    return folder
