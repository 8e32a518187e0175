"""Decoding of the whole 7B model, and the parts of a PPO step."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from accelerator_lines import models, timing
from accelerator_lines.training import make_config
from configs import ppo as ppo_presets
from vlalign_jax import trees
from vlalign_jax.generation.generate import make_generate
from vlalign_jax.generation.sampling import Sampling
from vlalign_jax.models import cache, vlm
from vlalign_jax.optim import optimizer
from vlalign_jax.sharding import mesh as meshes
from vlalign_jax.sharding import zero
from vlalign_jax.steps import answer_rows, ppo_program, sampler


def decode(settings):
  """Yields tokens a second against what reading weights and cache takes, bfloat16."""
  c = make_config(settings, "llava15_7b")
  model, mesh = models.architecture(c, settings["tiny"]), meshes.make_mesh(c.mesh)
  options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "mesh": mesh}
  _, shapes = vlm.abstract_params(model, **options)
  params = models.random_params(meshes.place(shapes, zero.shardings(mesh, shapes, split=False)))
  length, new = (32, 16) if settings["tiny"] else (1024, 128)
  layer, head = models.decoder_sizes(model)
  weights = 2 * (model.language.layers * layer + head)
  chip = timing.chip()
  for batch in (8, 32):
    rows = models.packed_rows(model, mesh, batch, length, 1)
    rows, numbers = models.prompt_rows(rows), jnp.arange(batch, dtype=jnp.int32)
    took, compiling = [], 0.0
    for tokens in (1, new + 1):
      sampling = Sampling(max_new_tokens=tokens, temperature=0.0)
      generate = make_generate(model, sampling, mesh=mesh, dtype=jnp.bfloat16)
      call, seconds = timing.compiled(generate, params, rows, numbers, np.int32(0))
      compiling += seconds
      took.append(
        timing.seconds(lambda: call(params, rows, numbers, np.int32(0)), repeats=3)  # noqa: B023
      )
    each = (took[1] - took[0]) / new
    keys = cache.cache_bytes(model.language, batch, length, 1, new // 2, 2)
    result = {
      "prefill_ms": took[0] * 1e3,
      "prefill_tokens_per_s": batch * length / took[0],
      "ms_per_token": each * 1e3,
      "tokens_per_s": batch / each,
      "GB_per_s": (weights + keys) / each / 1e9,
    }
    if chip and chip.bandwidth:
      result["of_bandwidth"] = (weights + keys) / each / chip.bandwidth
    yield (
      {"what": f"{batch} prompts of {length}, {new} tokens"}
      | result
      | {
        "compile_s": compiling,
        "temp_GiB": timing.temporaries(call),
      }
    )


def ppo(settings):
  """Yields the seconds of each part of a step, 4 layers, actor and critic fully trained."""
  c = make_config(settings, "llava15_7b", ppo_presets)
  c.batch_size, new = (4, 4) if settings["tiny"] else (32, 128)
  c.ppo.max_new_tokens, c.ppo.critic_warmup = new, 0
  length = 32 if settings["tiny"] else 704
  model = models.architecture(c, settings["tiny"], 2 if settings["tiny"] else 4)
  judge, mesh = dataclasses.replace(model, head=vlm.SCORE), meshes.make_mesh(c.mesh)
  sampling = Sampling(
    max_new_tokens=new,
    temperature=c.ppo.temperature,
    top_k=c.ppo.top_k,
    top_p=c.ppo.top_p,
    tempered=True,
  )
  program = ppo_program.make_program(c, model, judge, judge, sampling, mesh, 1000)

  def split(learner):
    is_trained = functools.partial(optimizer.is_trained, config=c)
    return trees.split(models.random_params(learner.params), is_trained)

  (params, frozen), (critic, critic_frozen) = split(program.actor), split(program.critic)
  reward = models.random_params(program.reward.params)
  reference = models.copied(params, program.actor.reference)
  state = program.init_state(params, critic)
  rows = models.packed_rows(model, mesh, c.batch_size, length, 1)
  prompts, streams = models.prompt_rows(rows), jnp.arange(c.batch_size, dtype=jnp.int32)
  shape = (1, new)

  def part(name, call, repeats=2):
    result = call()
    took = timing.seconds(call, repeats=repeats)
    return result, {"what": name, "s": took}

  actor = trees.merge(state.params, frozen)
  answering = sampler.make_sampler(
    c, model, program.actor, sampling, mesh, np.array([length]), held=0
  )
  placed, line = part("place", lambda: answering.place(actor))
  yield line
  features, line = part("tower", lambda: program.vision_features(actor, prompts, None))
  yield line
  prompts = prompts | {"vision_features": features}
  answers, line = part("sample", lambda: answering.sample(placed, prompts, streams, np.int32(0)))
  yield line | {"tokens_per_s": c.batch_size * new / line["s"]}
  rows = program.answer_rows(prompts, answers.tokens, answers.lengths)
  expected, line = part("reference", lambda: program.reference((reference, frozen), rows, shape))
  yield line
  values, line = part(
    "values", lambda: program.values((state.critic.params, critic_frozen), rows, shape)
  )
  yield line
  places = answer_rows.last_places(answers.lengths, rows["tokens"].shape[1], new)
  scores, line = part("scores", lambda: program.scores(reward, rows | {"answers": places}, None))
  yield line
  (fields, _), line = part(
    "advantages",
    lambda: program.compute_advantages(
      scores,
      scores,
      answers.log_probabilities,
      expected,
      answers.drawn_log_probabilities,
      values,
      answers.lengths,
      answers.ended,
      np.float32(0.1),
    ),
  )
  yield line
  rows = rows | fields
  index = np.arange(c.batch_size // c.ppo.num_mini_batches, dtype=np.int32)
  actor = placed = features = None
  held = {"state": state}

  def update():
    held["state"], logged = program.update_step(
      held["state"],
      frozen,
      critic_frozen,
      rows,
      index,
      np.float32(0.1),
      None,
      with_policy=True,
      same_tower=True,
    )
    return logged

  _, line = part("one update of actor and critic", update)
  updates = c.ppo.num_ppo_epochs * c.ppo.num_mini_batches
  yield line | {"updates_of_a_step": updates, "peak_GiB": timing.peak_memory()}
