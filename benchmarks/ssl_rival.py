"""The public CheXFound's training step behind a pipe; `ssl_step.py --rival DIR` starts this with PYTHONPATH=DIR.

Its package has the name of ours, so it needs a process of its own.  DIR is a checkout that somebody
made runnable on a CPU; what is used of it are its public classes.  One JSON object a line comes in
on standard input, one goes out on standard output; what the checkout prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # last: the checkout comes first

from chexfound.configs import dinov2_default_config  # noqa: E402
from chexfound.data.datasets.extended import ExtendedVisionDataset  # noqa: E402
from chexfound.train.ssl_meta_arch import SSLMetaArch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from ssl_engine import Engine, autocast  # noqa: E402

from chexfound.data import (
    DataAugmentationDINO,
    MaskingGenerator,
    collate_data_and_cast,  # noqa: E402
)

if not torch.cuda.is_available():  # whatever a checkout left of them
    torch.Tensor.cuda = lambda self, *args, **options: self
    torch.cuda.synchronize = lambda *args: None


class Files(ExtendedVisionDataset):
    """Image files, decoded and augmented as the checkout's own datasets do it."""

    def __init__(self, files: list[str], transform: Any) -> None:
        super().__init__(root="", transform=transform, target_transform=lambda _: ())
        self.files = files

    def get_image_data(self, index: int) -> bytes:
        """The file as it is."""
        return Path(self.files[index]).read_bytes()

    def get_target(self, index: int) -> int:
        """None: nothing is supervised."""
        return 0

    def __len__(self) -> int:
        return len(self.files)


class Reference(Engine):
    """The step as its training loop takes it, without FSDP and loss scaling."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        cfg = OmegaConf.merge(OmegaConf.create(dinov2_default_config), settings["config"])
        random.seed(settings["seed"])
        torch.manual_seed(settings["seed"])
        self.model = SSLMetaArch(cfg)
        for name, module in self.model.student.items():
            self.model.teacher[name].load_state_dict(module.state_dict())
        self.model.need_to_synchronize_fsdp_streams = False
        self.model.train()
        betas = (cfg.optim.adamw_beta1, cfg.optim.adamw_beta2)
        self.optimizer = torch.optim.AdamW(self.model.get_params_groups(), betas=betas)
        self.clip = cfg.optim.clip_grad
        self.terms = {"koleo_loss": 2.0, "ibot_loss": 2.0 * cfg.ibot.loss_weight}
        self.own_ema = self._moves_its_teacher()
        crops, grid = cfg.crops, cfg.crops.global_crops_size // cfg.student.patch_size
        augmentation = DataAugmentationDINO(
            crops.global_crops_scale,
            crops.local_crops_scale,
            crops.local_crops_number,
            global_crops_size=crops.global_crops_size,
            local_crops_size=crops.local_crops_size,
        )
        self.dataset = Files(self.files, augmentation)
        self.collated = functools.partial(
            collate_data_and_cast,
            mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
            mask_probability=cfg.ibot.mask_sample_probability,
            n_tokens=grid**2,
            mask_generator=MaskingGenerator(input_size=(grid, grid), max_num_patches=0.5 * grid * grid),
            dtype=torch.float32,
        )

    def _moves_its_teacher(self) -> bool:
        """Whether `update_teacher` does anything: as published it walks FSDP modules only, and fails without any."""
        student, teacher = (next(model["backbone"].parameters()) for model in (self.model.student, self.model.teacher))
        with torch.no_grad():
            was = student.clone()
            student += 1
            with contextlib.suppress(RuntimeError):
                self.model.update_teacher(0.5)
            moved = not torch.equal(teacher, was)
            student.copy_(was)
            teacher.copy_(was)
        return moved

    def weights(self) -> dict[str, Tensor]:
        """Of both, without the losses' centres."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if name.startswith(("student.", "teacher."))}

    def sample(self, file: str) -> Any:
        """By its dataset."""
        return self.dataset[self.files.index(file)]

    def collate(self, samples: list[Any]) -> Any:
        """By its function."""
        return self.collated(samples)

    def crops(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """By their names in its collated batch."""
        return batch["collated_global_crops"], batch["collated_local_crops"], batch["collated_masks"]

    def step(self, batch: Any, values: dict[str, float], precision: str) -> float:
        """Its displayed KoLeo and iBOT are half of what it back-propagates, and iBOT's lacks its weight."""
        for group in self.optimizer.param_groups:
            rate = values["last_layer_lr"] if group["is_last_layer"] else values["lr"]
            group["lr"] = rate * group["lr_multiplier"]
            group["weight_decay"] = values["weight_decay"] * group["wd_multiplier"]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            parts = self._forward_backward(batch, values["teacher_temp"])
        for module in self.model.student.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.clip)
        self.optimizer.step()
        self._update_teacher(values["momentum"])
        return sum(self.terms.get(name, 1.0) * float(part) for name, part in parts.items())

    def _forward_backward(self, batch: Any, temperature: float) -> dict[str, Tensor]:
        try:
            return self.model.forward_backward(batch, teacher_temp=temperature)
        except (RuntimeError, ValueError) as error:  # Sinkhorn asks for a process group, and has none here
            if "process group" not in str(error) or torch.distributed.is_initialized():
                raise
            where = f"file://{tempfile.mkdtemp()}/store"
            torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
            return self.model.forward_backward(batch, teacher_temp=temperature)

    @torch.no_grad()
    def _update_teacher(self, momentum: float) -> None:
        if self.own_ema:
            self.model.update_teacher(momentum)
            return
        teacher = list(self.model.teacher.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, list(self.model.student.parameters()), alpha=1 - momentum)


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    engine = Reference(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, method)(*arguments)), file=out)


if __name__ == "__main__":
    main()
