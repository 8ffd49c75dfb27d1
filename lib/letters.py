"""A plan in letters, for a terminal: what each of its steps does to each latent."""


def text_picture(plan) -> str:
    """One line a step, one column a latent: T target, G given, a anchor, r read, . unseen.

    d: the dummy block. Behind a line: reads that do not stand where they lie in time."""
    dummies = sorted(i for i in plan.made_at if i < 0)[::-1]
    columns = [*dummies, *range(plan.length)]
    heads = " ".join(f"{'d' if i < 0 else i:>2}" for i in columns)
    lines = ["latent    " + heads]
    for n, step in enumerate(plan.steps):
        mark = marks(step)
        row = " ".join(f"{mark.get(i, '.'):>2}" for i in columns)
        offset = step.pos[-1] - step.targets[-1]
        shown = [(i, p) for i, p in step.reads if i >= 0 and i not in step.own]
        moved = [f"{i}@{p}" for i, p in shown if p - i != offset]
        lines.append(f"step {n:<4} {row}" + (f"   moved: {' '.join(moved)}" if moved else ""))
    return "\n".join(lines)


def marks(step) -> dict[int, str]:
    """latent -> its letter in a picture of the plan."""
    mark = {i: "r" for i, _ in step.reads}
    mark |= {i: "a" for i in step.anchors}
    mark |= {i: "G" if i in step.given else "T" for i in step.targets}
    return mark
