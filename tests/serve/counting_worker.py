"""What vLLM's workers do beside their work in tests: they count the pictures that they encode.

An engine in one process imports this module itself. Where each worker is a process of its own, it imports the module if
`worker_extension_cls` names `Counting`.
"""

from mg_fast.models.mini_gemini.encoder import PictureEncoder

_counted: list[int] = []
_encode = PictureEncoder.encode


def _counting(self, pixel_values, *rest, **options):
    _counted.append(len(pixel_values))
    return _encode(self, pixel_values, *rest, **options)


PictureEncoder.encode = _counting


class Counting:
    """A further base of vLLM's worker class. `collective_rpc("take_counted")` asks all workers."""

    def take_counted(self) -> list[int]:
        """The numbers of pictures of each call of the encoder since the last time that this was asked."""
        taken = _counted.copy()
        _counted.clear()
        return taken
