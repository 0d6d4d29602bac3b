"""Takes uploaded files: their pictures are checked and kept in memory."""

import asyncio
from collections.abc import Awaitable, Callable

from .limits import Limits, RequestRefused
from .shares import TurnsOfEach
from .store import PictureStore
from .uploads import checked_picture, kept

# Uploads that are read at the same time, whose larger files wait on the disk in the server's private folder, and
# pictures that are decoded at the same time.
MOST_READ, MOST_DECODED = 16, 2
# Uploads of one browser, and of one address, that are read at the same time. Others of it wait.
BROWSER_READS, ADDRESS_READS = 2, 4


class UploadDesk:
    """Takes the uploads of all browsers. It is used from one event loop.

    Args:
        limits: of the server.
        store: that keeps the pictures.
        metrics: of the server.
    """

    def __init__(self, limits: Limits, store: PictureStore, metrics):
        self.limits, self.store, self.metrics = limits, store, metrics
        self._reading = asyncio.Semaphore(MOST_READ)
        self._of_browser, self._of_address = TurnsOfEach(BROWSER_READS), TurnsOfEach(ADDRESS_READS)
        self._decoding = asyncio.Semaphore(MOST_DECODED)

    async def take(
        self, scope: dict, receive: Callable[[], Awaitable[dict]], browser: str, address: str = ""
    ) -> list[str]:
        """The names of the pictures in an upload, in the order of its files.

        Args:
            scope: of ASGI, of a request with a form.
            receive: gives the form, of limited size, within a limited time from its first call on.
            browser: the browser's secret.
            address: of the client; empty where it is not known.

        Raises:
            RequestRefused: this is no form with files, or a file is no picture that is taken.
        """
        from starlette.formparsers import MultiPartException
        from starlette.requests import ClientDisconnect, Request

        if not dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/form-data"):
            raise RequestRefused("expected a form with files (multipart/form-data)")
        self.store.check_unused(browser, address)
        # A client waits for its own uploads before it takes a place from others.
        async with self._of_browser.turn(browser), self._of_address.turn(address), self._reading:
            try:
                form = await Request(scope, receive).form(max_files=self.limits.pictures, max_fields=4)
            except MultiPartException as error:
                raise RequestRefused(f"this form cannot be read: {error.message}") from None
            except ClientDisconnect:
                raise RequestRefused("the connection was closed") from None
            try:
                files = [file for file in form.getlist("files") if hasattr(file, "read")]
                if not files:
                    raise RequestRefused("expected at least one file")
                return [await self._keep_file(file, browser, address) for file in files]
            finally:
                await form.close()

    async def _keep_file(self, file, browser: str, address: str) -> str:
        async with self._decoding:
            data = await file.read(self.limits.picture_bytes + 1)
            return await self._keep(data, browser, address)

    async def keep(self, data: bytes, browser: str) -> str:
        """Checks a picture file and keeps it; returns its name.

        Raises:
            RequestRefused: it is no picture that is taken, or there is no room for it.
        """
        async with self._decoding:
            return await self._keep(data, browser)

    async def _keep(self, data: bytes, browser: str, address: str = "") -> str:
        try:
            # The file is decoded here and never again: what is kept was written by this server.
            file, kind = await asyncio.to_thread(lambda: kept(*checked_picture(data, self.limits)))
            name = self.store.put(file, kind, browser=browser, address=address)
        except RequestRefused:
            self.metrics.uploaded(taken=False)
            raise
        self.metrics.uploaded(taken=True)
        return name
