"""The schedule of nano's training: its stages in order, and what each of them teaches."""

import dataclasses

# The end of the name of a stage that repeats another one with other pictures.
AGAIN = " again"


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """One part of the training: its length, its learning rate, and the modules of the model that learn.

    Args:
        faster: those of the learning modules that learn at three times the rate.
        told: arguments of `data.told`, where scenes are told in codes instead of shown as pictures.
        noise: how far codes are off, where the words in them have a spread of 0.3. Image tokens, which replace the
            codes later, never match them exactly.
    """

    name: str
    steps: int
    batch: int
    rate: float
    learns: tuple[str, ...]
    faster: tuple[str, ...] = ()
    told: dict | None = None
    noise: float = 0.0

    @property
    def lesson(self) -> str:
        """The name without the word that tells a second round from the first."""
        return self.name.removesuffix(AGAIN)

    @property
    def again(self) -> bool:
        """Whether this is the second round of a lesson."""
        return self.name.endswith(AGAIN)


TOWERS = ("vision_tower", "vision_tower_aux")
BRIDGE = ("mm_projector", "patch_mining")
# The shares of conversations about no picture, one and two.
TWO, PAIRED, ANY = (0.0, 0.2, 0.8), (0.0, 0.5, 0.5), (0.15, 0.4, 0.45)
# The same where pictures are shown, when pairs have been learned. The second round has more wishes, which are
# conversations about no picture.
SHOWN_PAIRED, SHOWN_ANY, SHOWN_AGAIN = (0.0, 0.75, 0.25), (0.15, 0.55, 0.3), (0.25, 0.45, 0.3)
WISHES = (0.65, 0.22, 0.13)
# Answers alone, without the turns of a conversation around them. This way one scene holds many of them.
FACTS = dict(cells=36, turns=16, answers_only=True)
TALK = dict(cells=36, turns=6, answers_only=False)
STAGES = (
    TrainingStage("lookup", 400, 32, 3e-3, ("language_model",), told=FACTS | {"cells": 8}),
    TrainingStage(
        "pairs", 400, 24, 2e-3, ("language_model",), told=FACTS | {"cells": 8, "pictures": TWO, "described": 0.2}
    ),
    TrainingStage(
        "search", 250, 28, 2e-3, ("language_model",), told=FACTS | {"pictures": PAIRED, "described": 0.2}, noise=0.4
    ),
    TrainingStage("language", 700, 10, 2e-3, ("language_model",), told=TALK | {"pictures": ANY}, noise=0.4),
    TrainingStage("digits", 1150, 32, 3e-3, ("vision_tower_aux",)),
    TrainingStage("numbers", 2400, 12, 2e-3, ("vision_tower_aux",)),
    TrainingStage("views", 450, 64, 2e-3, ("vision_tower",)),
    # The towers continue to learn here, and the modules that use their features begin.
    TrainingStage("scenes", 920, 12, 5e-4, (*TOWERS, *BRIDGE), faster=BRIDGE),
    TrainingStage("alignment", 150, 16, 1e-3, BRIDGE),
    TrainingStage("everything", 600, 10, 5e-4, (*BRIDGE, "language_model")),
    # Reading was not learned to the end above, and its lessons are repeated at their old rates.
    TrainingStage("numbers again", 2200, 12, 2e-3, ("vision_tower_aux",)),
    TrainingStage("scenes again", 450, 12, 5e-4, (*TOWERS, *BRIDGE), faster=BRIDGE),
    TrainingStage("everything again", 700, 10, 5e-4, (*BRIDGE, "language_model")),
    # To put the shapes of a wish in nano's order takes more practice than anything else that is said.
    TrainingStage("wishes", 350, 16, 5e-4, ("language_model",)),
)
# After these stages, the modules that learned in them get the mean of their weights before and after. So nano keeps
# what the stage teaches beside what it would forget in it (Wortsman et al., "Robust fine-tuning of zero-shot models",
# 2022).
AVERAGED = ("wishes",)
