"""Modules and names that scripts of earlier versions import, and where they are now."""

from typing import NoReturn

from sora_train.errors import UserError


class MovedModuleError(UserError, ImportError):
    """A script imports a module by the name of an earlier version; the message has the new one."""


class RenamedNameError(UserError, AttributeError):
    """A script asks a module for a name of an earlier version. An AttributeError, so that `hasattr` answers False."""


def refuse_moved(name: str) -> None:
    """Raises MovedModuleError where `name`, a dotted module that does not exist, had existed in an earlier version.

    `from sora_train.sampling import X` looks for a module `sora_train.sampling.X` last, so names are found here too
    that were in a module which is a package now.
    """
    old = name.removeprefix("sora_train.")
    if old in RENAMED_NAMES:
        raise MovedModuleError(_renamed(old))
    parent = old.rpartition(".")[0]
    for candidate in (old, parent):
        if candidate in MOVED:
            _refuse(candidate)


def refuse_renamed(name: str) -> None:
    """Raises RenamedNameError where `name`, `package.Name` below sora_train, is of an earlier version."""
    if name in RENAMED_NAMES:
        raise RenamedNameError(_renamed(name))


def _renamed(old: str) -> str:
    return f"sora_train.{old} is called {RENAMED_NAMES[old]} now; import that name instead"


def _refuse(old: str) -> NoReturn:
    renamed = f", where {RENAMED[old]}" if old in RENAMED else ""
    raise MovedModuleError(
        f"what sora_train.{old} held is in sora_train.{MOVED[old]} now{renamed}; change the import"
    )


RENAMED = {
    "operations": "Request is called SampleRequest",
    "replay_command": "Request is called ReplayRequest",
}
RENAMED_NAMES = {
    "objectives.Draws": "SampleDraws",
    "objectives.Shown": "ConditionedLatents",
    "objectives.Term": "LossTerm",
    "objectives.Told": "SampleInfo",
}
MOVED = {
    "accounts": "training.outputs.run_totals",
    "adversary": "objectives.adversary",
    "api": "sampling.api",
    "atomic": "base.files",
    "card": "training.card",
    "checkpointing": "checkpoint.saver",
    "contact_sheet": "base.contact_sheet",
    "distributed": "runtime.world",
    "ema": "training.optim.ema",
    "encoding": "training.pipeline.encoding",
    "evaluate": "training.outputs.evaluate",
    "finish": "training.outputs.finish",
    "gauges": "monitoring.gauges",
    "goodput": "monitoring.goodput",
    "health": "runtime.health",
    "initialise": "training.initialise",
    "keys": "base.seeding",
    "loss_health": "training.resilience.spike_detector",
    "metrics": "monitoring.metrics",
    "notices": "runtime.preemption",
    "operations": "sampling.operations",
    "optim": "training.optim.optim",
    "posterior": "objectives.posterior",
    "probe": "training.resilience.probe",
    "progress": "base.progress",
    "quality": "evaluation.quality",
    "replay": "training.outputs.step_picture",
    "replay_command": "tools.doctor.replay.replay",
    "report": "monitoring.report.report",
    "resume": "training.resilience.resume",
    "rollback": "training.resilience.rollback",
    "run_events": "monitoring.events",
    "run_folder": "monitoring.run_folder",
    "sample_folder": "sampling.files",
    "sampling": "sampling.pipeline",
    "shapes": "data.shapes",
    "specification": "objectives.spec",
    "spikes": "training.resilience.spike_report",
    "stages": "config.stages",
    "step_numbers": "training.outputs.step_metrics",
    "stored_tensors": "checkpoint.tensors",
    "tracking": "monitoring.tracking.process",
    "trainer": "training.trainer",
    "training_data": "training.pipeline.data",
    "training_plan": "training.pipeline.plan",
    "training_sources": "data.index.sources",
    "vae_export": "objectives.vae",
    "validate": "objectives.validation",
    "warm_up": "training.warm_up",
    "watch": "monitoring.status",
    "weights_in": "tools.convert.from_diffusers",
    "weights_out": "tools.convert.to_diffusers",
    "config.base": "config.sections.base",
    "config.data": "config.sections.data",
    "config.model": "config.sections.model",
    "config.parallel": "config.sections.parallel",
    "config.run": "config.sections.run",
    "config.settings": "config.sections.settings",
    "data.balance": "data.tape.balance",
    "data.buckets": "data.tape.buckets",
    "data.cache": "data.latents.cache",
    "data.caption_choice": "data.captions.choice",
    "data.caption_texts": "data.captions.texts",
    "data.captions": "data.captions.tables",
    "data.decode": "data.decode.frames",
    "data.decode_pool": "data.decode.pool",
    "data.index": "data.index.folder",
    "data.index_shards": "data.index.shards",
    "data.micro_batches": "data.tape.micro_batches",
    "data.plan": "data.tape.tape",
    "data.reading": "data.storage.cached_reads",
    "data.remote": "data.storage.remote",
    "data.retry": "data.storage.retry",
    "data.shards": "data.index.shard_writer",
    "data.splice": "data.tape.mixture",
    "data.stored": "data.latents.members",
    "data.tars": "data.index.tars",
    "data.video_io": "data.decode.video_io",
    "data.walk": "data.tape.shuffle",
    "diffusion.conditioning": "diffusion.condition_masks",
    "diffusion.given": "diffusion.condition_frames",
    "models.attention": "models.transformer.attention",
    "models.attention_backends": "models.transformer.attention_backends",
    "models.discriminator": "models.vae.discriminator",
    "models.dit": "models.transformer.dit",
    "models.flash_packages": "models.transformer.attention_backends",
    "models.folders": "models.hub",
    "models.layers": "models.transformer.layers",
    "models.lpips": "models.vae.lpips",
    "models.rope": "models.transformer.rope",
    "models.spread": "models.work_sharing",
    "models.text": "models.text.encoder",
    "models.text_stored": "models.text.published",
    "models.vae": "models.vae.autoencoder",
    "models.vae_geometry": "models.vae.geometry",
    "models.wan_layout": "models.transformer.wan_layout",
    "parallel.activations": "parallel.memory.activations",
    "parallel.agreement": "parallel.checks.agreement",
    "parallel.collectives": "parallel.context.collectives",
    "parallel.context": "parallel.context.context",
    "parallel.deepspeed": "parallel.deepspeed.engine",
    "parallel.mesh": "parallel.layout",
    "parallel.offload": "parallel.memory.offload",
    "parallel.ring": "parallel.context.ring",
    "tools.measuring": "device.measuring",
    "tools.replay": "tools.doctor.replay",
    "tools.replay.replay": "tools.doctor.replay.replay",
}
"""Old name -> new name, both below `sora_train.`."""
