"""The errors a caller can act on. Each message says what was expected and what came."""


class MgFastError(Exception):
    """Base of every error that mg_fast raises on purpose."""


class CheckpointError(MgFastError, ValueError):
    """A checkpoint folder, file or configuration that cannot be loaded as Mini-Gemini."""


class PictureError(MgFastError, ValueError):
    """A picture that cannot be read, or that has nothing to show at the model's resolution."""


class PromptError(MgFastError, ValueError):
    """A prompt that does not fit its pictures, its template or the model's context length."""


class BackendError(MgFastError, RuntimeError):
    """A backend was asked for that cannot run here; the message is the reason."""
