"""Tasks of EleutherAI's harness (lm-eval) by their names: what eval.py measures on, and what GPTQ.py may be calibrated with."""
from pathlib import Path
from typing import Any, Sequence

from lm_eval.tasks import TaskManager

from cli import UserError


def load_tasks(names: Sequence[str], include_path: Path | None = None, include_defaults: bool = True, flag: str = "--tasks",
               advice: str = "") -> tuple[TaskManager, list]:
    """The tasks and groups of tasks that the names stand for. UserError for an unknown name, or data that cannot be had; it ends with advice."""
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)             # lm-eval's own thousands take it a while to read
    if include_defaults and not all(known(manager, name) for name in names):
        manager = TaskManager(include_path=include_path)
    loaded: dict[str, Any] = {}
    for name in names:
        if not known(manager, name):
            raise UserError(f"{flag} {name}: no such task (`lm-eval ls tasks` lists them; --include_path FOLDER adds a folder's)")
        try:
            found = manager.load(manager.match_tasks([name]) or [name])
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{flag} {name}: its data cannot be had: {reason}. Without a network, write a task whose dataset is a local file "
                            f"and point --include_path to its folder (tests/lm_eval_tasks shows how){advice}") from error
        if any(getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) for task in found["tasks"].values()):
            raise UserError(f"{flag} {name}: tasks that run what the model writes, or show it pictures, are not supported")
        inner = {child for children in found["group_map"].values() for child in children}
        loaded |= {name: item for name, item in (found["groups"] | found["tasks"]).items() if name not in inner}
    return manager, list(loaded.values())


def known(manager: TaskManager, name: str) -> bool:
    return bool(manager.match_tasks([name])) or (name.endswith((".yaml", ".yml")) and Path(name).is_file())
