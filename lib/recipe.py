"""How a student was trained, and so how it is run: it lies in the checkpoint's metadata."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lib.common import is_first
from lib.shapes import check_levels
from lib.weights import config_from

FLAGS = {"levels": "denoising", "first_levels": "first_denoising"}  # entry -> flag, if another


@dataclass(frozen=True)
class Recipe:
    """Noise levels, sizes and rules of a student's training. raises: UserError for bad levels"""

    levels: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # before the shift [paper]
    first_levels: tuple[float, ...] = ()  # of the block that is made first, if others
    shift: float = 5.0  # [paper]
    block: int = 3  # [paper]
    anchors: int = 3  # [paper]
    head: int = 0  # size of the block of latent 0 if not `block`
    share_noise: str = "none"
    plans: str = "paper"  # the mix it was trained on (plans.py)

    def __post_init__(self) -> None:
        for levels in filter(None, (self.levels, self.first_levels)):
            check_levels(levels)

    @classmethod
    def read(cls, values: dict | None) -> "Recipe | None":
        """From a checkpoint's metadata; None if it says nothing. raises: UserError"""
        if values is None:
            return None
        return config_from(cls, values, "a student's recipe is not one of this version")

    def write(self) -> dict:
        return asdict(self)

    def levels_of(self, n: int) -> tuple[float, ...]:
        """The noise levels of block n, in order of generation; a dummy is none."""
        return self.first_levels if n == 0 and self.first_levels else self.levels


def recipe_of(dit) -> Recipe:
    """Of a network with a `recipe`; if its file is silent, the paper's way."""
    return Recipe.read(dit.recipe) or Recipe()


def trained_as(config) -> Recipe:
    """What a student must remember of its training, by the flags of a script."""
    values = {k: getattr(config, k) for k in ("shift", "block", "anchors", "head", "share_noise")}
    first = getattr(config, "first_denoising", ())
    return Recipe(tuple(config.denoising), tuple(first), plans=config.plans, **values)


def say_changes(trained: Recipe, now: Recipe) -> None:
    """Say which flags ask for something else than what a student was trained with."""
    for entry, value in asdict(now).items():
        was, flag = getattr(trained, entry), FLAGS.get(entry, entry)
        if value != was:
            print(f"note: --{flag} {value}, but this student was trained with {was}")


def remember(students: Sequence, recipe: Recipe) -> None:
    """Students that are trained on will have this recipe in their files; what is new is said."""
    for student in students:
        if student.recipe and is_first():
            say_changes(Recipe.read(student.recipe), recipe)
        student.recipe = recipe.write()
