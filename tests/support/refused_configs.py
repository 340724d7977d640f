"""Configurations that are refused on the command line, and a part of the message as a regular expression."""

from __future__ import annotations

JUDGE = ("reward=judge", "reward.terms.judge.url=http://127.0.0.1:1/v1", "reward.terms.judge.model=m")

PROGRAM = ("task=program", "task.command='sh agent.sh'", "algorithm.credit=episode", "trainer.warmup.steps=0")

VERIFIERS = ("task=verifiers", "task.env=mine", "algorithm.credit=episode", "trainer.warmup.steps=0")

MIXTURE = ("task=mixture", "+task@task.tasks.a=color_codeword")

REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((f"orchestrator.stop=[{','.join('abcdefghijklmnopq')}]",), "orchestrator.stop has 17 texts, .* remove all but 16"),
    (("orchestrator.stop=['']",), "orchestrator.stop='' cannot be used, .* every answer would end at its first token"),
    (("orchestrator/renderer=none",), "renderer=null leaves .*=qwen3vl_tiny .*image tokens and pixels: set .*=auto$"),
    (("~orchestrator/renderer",), "orchestrator.renderer=null leaves model.name=qwen3vl_tiny without a renderer"),
    (("orchestrator.renderer.name=qwen3",), "name=qwen3 does not serve model.vlm.family=qwen3_vl, .* one of qwen3-vl"),
    (("orchestrator.renderer.name=no_module:Mine",), "renderer.name=no_module:Mine names a module that"),
    (("model.vlm.renderers=[]",), r"model.vlm.renderers=\[\] names no renderer"),
    (("~model/vlm",), "renderer.name=auto takes the first of model.vlm.renderers, and model.vlm is null"),
    (("~model/vlm", "orchestrator/renderer=none"), "renderer=null leaves .* its tokens: set .*.name=qwen3"),
    (
        ("~model/vlm", "orchestrator.renderer.name=qwen3"),
        "model.tiny cannot build a checkpoint of model.vlm.family=null",
    ),
    (("inference.kind=vllm",), r"inference.kind=vllm does not bring .* option instead, inference=embedded\|vllm"),
    (
        ("weight_sync.kind=folder",),
        r"weight_sync.kind=folder does not bring .* choose the option instead, weight_sync=in_proc",
    ),
    (("weight_sync=folder",), "weight_sync=folder does not work with inference=embedded.*=in_process"),
    (("inference=vllm", "weight_sync=in_process"), "weight_sync=in_process does not work .* set weight_sync=folder"),
    (
        ("model.device=cpu", "inference.batching=rolling"),
        "inference.batching=rolling lets requests .* model.device=cpu samples batches whole.*=together",
    ),
    (
        ("inference=vllm", "inference.urls=[http://127.0.0.1:8000]", "weight_sync.running_requests=keep"),
        "running_requests=keep needs servers that the run starts.*=recompute",
    ),
    (
        ("inference=vllm", "inference.urls=[http://far:1]"),
        r"weight_sync.root=/dev/shm is in this host's memory, so the server http://far:1 .* or weight_sync=nccl",
    ),
    (("orchestrator.max_staleness=400", "inference=vllm"), "max_staleness=400 is not below trainer.max_steps=400"),
    (
        ("algorithm.filters.repetition=drop",),
        "repetition_window=3000 is longer than orchestrator.max_new_tokens=10, .*=drop would",
    ),
    (
        ("model=qwen3vl", "task.images_per_turn=9"),
        r"seq_len=1024 is too short for .*images_per_turn=9 images of 64 tokens each .* 1210 tokens, .*=2048",
    ),
    (
        ("inference=vllm", "orchestrator.top_p=0.9"),
        "top_p=0.9 keeps any number of tokens, .* set orchestrator.top_k=50 as well",
    ),
    (("orchestrator.top_k=2000",), "top_k=2000 is out of range, .* the records of what each token is sampled"),
    (("orchestrator.max_staleness=1",), "orchestrator.max_staleness=1 lets .* inference=embedded"),
    (
        ("inference.max_model_len=1023",),
        "inference.max_model_len=1023 is shorter than trainer.seq_len=1024, .* set trainer.seq_len=1023$",
    ),
    (("trainer.seq_len=4097",), "trainer.seq_len=4097 is longer than model.tiny.max_position_embeddings=4096"),
    (("orchestrator.max_new_tokens=1024",), "max_new_tokens=1024 fills all of trainer.seq_len=1024"),
    (("orchestrator.group_size=1",), "group_size=1 leaves .* algorithm.advantage=group_normalized would be 0"),
    (
        ("algorithm=rloo", "orchestrator.group_size=1"),
        "group_size=1 .*=leave_one_out would be 0",
    ),
    (
        ("algorithm.overlong.penalty=0.5",),
        r"algorithm.overlong.penalty=0.5 has no effect with algorithm.overlong.tokens=0, .*: set .*overlong.tokens",
    ),
    (
        ("algorithm.overlong.longest=5",),
        r"algorithm.overlong.longest=5 has no effect with algorithm.overlong.tokens=0",
    ),
    (
        ("algorithm.overlong.tokens=2", "algorithm.overlong.longest=11"),
        r"overlong.longest=11 is longer than orchestrator.max_new_tokens=10, .* set algorithm.overlong.longest=10",
    ),
    (
        ("algorithm.overlong.tokens=10",),
        r"overlong.tokens=10 is not below orchestrator.max_new_tokens=10, .* set algorithm.overlong.tokens=2$",
    ),
    (
        ("algorithm.overlong.tokens=8", "algorithm.overlong.longest=8"),
        r"overlong.tokens=8 is not below algorithm.overlong.longest=8, so every answer would be punished",
    ),
    (
        ("algorithm.vision_advantage.cap=1",),
        r"vision_advantage.cap=1.0 has no effect with algorithm.vision_advantage.weight=0, .*: set .*weight=1",
    ),
    (
        ("algorithm.vision_advantage.weight=1", "~model/vlm", "orchestrator.renderer.name=qwen3"),
        r"vision_advantage.weight=1.0 compares answers with and without .* model.vlm=null has none: set .*weight=0",
    ),
    (
        ("monitor.blind_guard=stop", "~model/vlm", "orchestrator.renderer.name=qwen3"),
        r"monitor.blind_guard=stop reads .* model.vlm=null there are no images, .*: set monitor.blind_guard=none",
    ),
    (
        ("algorithm.vision_advantage.weight=1", "orchestrator.groups_per_step=1"),
        r"vision_advantage.weight=1.0 takes the images of another problem .*groups_per_step=1 is the only one",
    ),
    (
        (
            *("algorithm.vision_advantage.weight=1", "algorithm.advantage=none", "algorithm.kl.advantage=1"),
            "reference=initial",
        ),
        r"vision_advantage.weight=1.0 weights the advantages of rewards, and algorithm.advantage=none makes them all 0",
    ),
    (
        ("monitor.blind_guard=stop", "monitor.vision_gap_every=0"),
        r"monitor.blind_guard=stop reads .* monitor.vision_gap_every=0 makes none, .* set monitor.vision_gap_every=10",
    ),
    (
        ("algorithm.minibatches=289",),
        "algorithm.minibatches=289 is above the 288 rollouts of a step .* set algorithm.minibatches=288 or less",
    ),
    (("algorithm.target_kl=0.1",), "algorithm.target_kl=0.1 has no effect with algorithm.epochs=1 .* set algorithm.ep"),
    (
        ("algorithm=cispo", "algorithm.clip_dual=3"),
        "algorithm.clip_dual=3.0 has no effect with algorithm.loss=cispo, .* set algorithm.loss=grpo, or ",
    ),
    (
        ("algorithm.gae.lam=0.9",),
        "algorithm.gae.lam=0.9 has no effect with algorithm.advantage=group_normalized, .* set algorithm.advantage=gae",
    ),
    (("algorithm=ppo", "algorithm.refill.budget=2"), "algorithm.refill.budget=2 leaves out .* set .*refill.budget=1"),
    (
        ("algorithm=ppo", "algorithm.credit=return", "algorithm.compare=state"),
        "algorithm.compare=state has no effect with algorithm.advantage=gae, .* set algorithm.compare=turn",
    ),
    (
        ("algorithm=ppo", "algorithm.vision_advantage.weight=1"),
        "algorithm.vision_advantage.weight=1.0 weights turns, .* set algorithm.vision_advantage.weight=0",
    ),
    (
        ("algorithm=ppo", "algorithm.gae.level=turn", "algorithm.gae.gamma=0.9"),
        "algorithm.gae.gamma=0.9 discounts from token to token, .* set algorithm.gae.gamma=1",
    ),
    (
        ("algorithm=ppo", "algorithm.gae.level=turn"),
        "algorithm.gae.lam=0.95 has no effect with algorithm.gae.level=turn and algorithm.credit=turn, .* set .*lam=1",
    ),
    (("algorithm.clip_dual=1",), "algorithm.clip_dual=1.0 is out of range, .*above 1"),
    (("mode=dpo",), "dpo.from_run=null takes .* task.kind=color_codeword has none, .* or choose task=dataset"),
    (("dpo.from_run=outputs/a",), "dpo.from_run=outputs/a has no effect with mode=rl, .* set mode=dpo"),
    (
        ("mode=dpo", "dpo.from_run=a", "dpo.loss=ipo", "dpo.label_smoothing=0.1"),
        "label_smoothing=0.1 has no effect with dpo.loss=ipo",
    ),
    (
        ("mode=dpo", "dpo.from_run=a", "trainer.keep_best=eval/dpo/acuracy"),
        "eval/dpo/acuracy is no metric .* did you mean eval/dpo/accuracy",
    ),
    (
        ("mode=dpo", "task=dataset", "task.path=a.jsonl", "trainer.keep_best=eval/reward"),
        "keep_best=eval/reward is no metric of this run's evaluations, .* choose one of eval/dpo/accuracy",
    ),
    (("algorithm.kl.reward=0.1",), r"kl.reward=0.1 needs a second model, and reference=none .* set reference=initial"),
    (
        ("algorithm.advantage=none",),
        "algorithm.advantage=none with algorithm.kl.advantage=0 .* nothing would be learned: set .*kl.advantage=1",
    ),
    (
        ("algorithm.distill.top_k=8",),
        r"algorithm.distill.top_k=8 needs a second model, .* or algorithm.distill.top_k=0",
    ),
    (
        ("reference=initial", "algorithm.distill.weight=1"),
        r"distill.weight=1.0 compares .* algorithm.distill.top_k=0 reports none: set algorithm.distill.top_k=32",
    ),
    (
        ("reference=initial", "algorithm.distill.weight=1", "algorithm.distill.top_k=8", "algorithm.refill.budget=2"),
        r"algorithm.refill.budget=2 drops groups .* with algorithm.distill.weight=1.0 .*set .*zero_advantage=none",
    ),
    (
        ("reference=initial", "algorithm.kl.advantage=1", "algorithm.refill.budget=2"),
        r"algorithm.refill.budget=2 drops groups .* with algorithm.kl.advantage=1.0 .*set .*zero_advantage=none",
    ),
    (
        ("reference=ema", "algorithm.kl.advantage=1", "algorithm.filters.zero_advantage=drop"),
        r"algorithm.filters.zero_advantage=drop drops groups .* have a gradient too",
    ),
    (("algorithm.loss=gpro",), "algorithm.loss=gpro is neither one of grpo, .*=my_package.*; did you mean grpo"),
    (("algorithm.advantage=mine",), "algorithm.advantage=mine is neither one of group_normalized, "),
    (
        ("task=dataset", "task.path=rows.jsonl"),
        r"task.kind=dataset has no reward of its own, and reward names no term, .* choose reward=exact, or another of",
    ),
    (
        ("task=dataset", "task.path=rows.jsonl", "reward=exact", "reward.terms.exact.weight=0"),
        r"reward has no weight but 0, so every reward would be 0: set a weight in reward\.terms$",
    ),
    (("reward.task_weight=0",), "reward has no weight but 0, so .* or reward.task_weight=1$"),
    (("reward=exact", "algorithm.credit=episode"), "reward.terms.exact compares an answer with that of a data set, .*"),
    (("reward=format",), r"algorithm.credit=turn trains each turn .* set algorithm.credit=episode, or .*reward=\[\]"),
    (("reward=format", "algorithm.credit=return"), "algorithm.credit=return trains each turn on the rewards that"),
    (
        ("algorithm.discount=0.9",),
        "algorithm.discount=0.9 has no effect with .*credit=turn, .* set algorithm.credit=return",
    ),
    (
        ("algorithm.credit=episode", "algorithm.compare=state"),
        "algorithm.compare=state has no effect with .*=episode, ",
    ),
    (("algorithm.credit=return", "algorithm.discount=1.1"), "algorithm.discount=1.1 is out of range"),
    (("reward=format", "reward.terms.format.weight=nan"), "reward.terms.format.weight=nan is out of range"),
    (("+reward@reward.terms.mean=format", "algorithm.credit=episode"), "reward.terms.mean would be logged as reward/"),
    (("+reward@reward.terms.a$b=format",), "reward.terms has the name 'a.b', and no metric could be called by it"),
    (("reward=no_module:fn", "algorithm.credit=episode"), "reward.terms.fn.target=no_module:fn names a module that"),
    (("reward=/no/file.py:fn", "algorithm.credit=episode"), "target=/no/file.py:fn names the file /no/file.py, which"),
    (("task=mixture",), r"task.tasks names no task, so .* add each, \+task@task.tasks.<name>=dataset"),
    (
        ("task=mixture", "+task@task.tasks.a=dataset", "task.tasks.a.path=x"),
        r"task.tasks.a.kind=dataset has no reward .* choose \+reward@task.tasks.a.reward.terms.exact=exact, or",
    ),
    (("task=mixture", "+task@task.tasks.a=mixture"), "task.tasks.a is a mixture itself, .*: add its tasks to task.ta"),
    ((*MIXTURE, "++task.weights.b=2"), "task.weights.b=2.0 is the weight of no task, .*: write that of a$"),
    ((*MIXTURE, "++task.weights.a=0"), "task.weights.a=0.0 gives the task no share .* above 0 .* with ~task.tasks.a"),
    ((*MIXTURE, "++task.weights.a=-1"), "task.weights.a=-1.0 gives the task no share"),
    ((*MIXTURE, "++task.weights.a=nan"), "task.weights.a=nan gives the task no share"),
    ((*MIXTURE, "task.tasks.a.max_fault_rate=0.5"), "task.tasks.a.max_fault_rate has no effect, .* set task.max_fau"),
    (("task.num_workers=4",), "task.num_workers=4 has no effect with task.workers=thread, .* set task.workers=process"),
    ((*MIXTURE, "task.workers=process"), "task.workers=process has no effect, .* set task.tasks.<name>.workers"),
    ((*MIXTURE, "task.timeout_s=5"), r"task.timeout_s=5.0 has no effect, .* set task.tasks.<name>.timeout_s"),
    ((*MIXTURE, "task.tasks.a.image_size=40"), "task.tasks.a.image_size=40 is not a multiple of 32, .*: set task.ta"),
    ((*MIXTURE, "task.max_turns=2"), "task.max_turns=2 is out of range, .* each task keeps its own"),
    (
        ("task=mixture", "+task@task.tasks.a=no_module:Mine", "algorithm.credit=episode"),
        "task.tasks.a.target=no_module:Mine names a module that does not exist",
    ),
    (("mode=sft", "trainer.warmup.steps=0"), "mode=sft trains for trainer.warmup.steps=0"),
    (("mode=eval", "orchestrator.eval.problems=0"), "mode=eval evaluates orchestrator.eval.problems=0"),
    (("orchestrator.eval.problems=0",), "orchestrator.eval.every=10 evaluates orchestrator.eval.problems=0"),
    (
        ("orchestrator.eval.problems=0", "orchestrator.eval.target=0.9", "+eval_set@orchestrator.eval.sets.a=default"),
        "orchestrator.eval.target=0.9 is compared with the main evaluation, .*set orchestrator.eval.problems=128",
    ),
    (
        ("+eval_set@orchestrator.eval.sets.task=default",),
        "sets.task has a name that no set can have, because eval/task",
    ),
    (
        (
            *("+eval_set@orchestrator.eval.sets.a=default", "orchestrator.eval.sets.a.samples=0"),
            "orchestrator.eval.sets.a.greedy=false",
        ),
        "sets.a.samples=0 with orchestrator.eval.sets.a.greedy=false plays no answer",
    ),
    (("trainer.patience=2",), "trainer.patience=2 has no trainer.keep_best"),
    (("trainer.keep_best=eval/rewrad",), "keep_best=eval/rewrad is no metric of .*did you mean eval/reward"),
    (("trainer.keep_best=eval/ood/reward",), "keep_best=eval/ood/reward is no metric of this run's evaluations"),
    (
        ("trainer.keep_best=loss",),
        "trainer.keep_best='loss' cannot be used, .*set trainer.keep_best to a metric of an evaluation",
    ),
    (
        ("+eval_set@orchestrator.eval.sets.a=default", "trainer.keep_best=eval/a/pass@8"),
        "eval/a/pass@8 is no metric .*choose one of .*eval/a/pass@1",
    ),
    (
        ("orchestrator.eval.every=0", "trainer.keep_best=eval/reward"),
        "keep_best=eval/reward has no value, because the run makes no evaluation",
    ),
    (
        ("mode=sft", "trainer.keep_best=eval/reward"),
        "keep_best=eval/reward is no metric .* choose one of eval/demonstration_loss$",
    ),
    (
        ("mode=sft", "trainer.keep_best=eval/demonstration_loss", "orchestrator.eval.every=0"),
        "keep_best=eval/demonstration_loss has no value, because the run makes no evaluation while it trains",
    ),
    (("trainer.lr_warmup_steps=401",), "trainer.lr_warmup_steps=401 is longer than trainer.max_steps=400"),
    (("orchestrator.temperature=1e-40",), "orchestrator.temperature=1e-40"),
    (("trainer.betas=[0.9]",), r"trainer.betas=\[0.9\] does not have two numbers"),
    (("task=imported", "task.target=counting"), "task.target=counting is not of the form package.module:Class"),
    (("task=imported", "task.target=a..b:C"), "task.target=a..b:C is not of the form"),
    (("task=program",), "task.command has no value, so the run cannot start: set task.command="),
    ((*PROGRAM, "task.command='sh \\'agent'"), "task.command=sh 'agent cannot be split into words .No closing quota"),
    ((*PROGRAM, "mode=check"), "mode=check calls the env of a task, .*task.kind=program .*: set mode=eval"),
    ((*PROGRAM, "mode=play"), "mode=play calls the env of a task"),
    ((*PROGRAM, "mode=preview"), "mode=preview calls the env of a task"),
    ((*PROGRAM, "tool=[zoom]"), r"tool=.zoom. has no effect on task.kind=program, .*: set tool=\[\]"),
    ((*PROGRAM, "task.workers=process"), "task.workers=process has no effect on task=program, .*set task.processes"),
    ((*PROGRAM, "task.num_workers=2"), "task.num_workers=2 has no effect"),
    (
        (*PROGRAM, "task.reuse=true", "task.result=file"),
        "task.result=file does not work with task.reuse=true, .*=last_line",
    ),
    ((*PROGRAM, "task.result=none"), "task.result=none has no reward of its own, .* choose reward=exact"),
    ((*PROGRAM, "task.rows=0:5"), "task.rows says which rows are used and how, and task.path names none"),
    ((*PROGRAM, "task.columns.answer=a"), "task.columns says which rows are used"),
    ((*PROGRAM, "algorithm.credit=turn"), "algorithm.credit=turn trains each turn on a reward of its own, and a prog"),
    (
        (*PROGRAM, "trainer.warmup.steps=5"),
        "trainer.warmup.steps=5 needs demonstrations, and task.kind=program",
    ),
    (
        (*MIXTURE, "+task@task.tasks.b=program", "task.tasks.b.command=x", "task.tasks.b.num_workers=2"),
        "task.tasks.b.num_workers=2 has no effect",
    ),
    (("task=verifiers",), "task.env has no value, so the run cannot start: set task.env="),
    ((*VERIFIERS, "mode=check"), "mode=check calls the env of a task, .*task.kind=verifiers"),
    ((*VERIFIERS, "tool=[zoom]"), "tool=.zoom. has no effect on task.kind=verifiers"),
    ((*VERIFIERS, "task.num_workers=2"), "task.num_workers=2 has no effect on task=verifiers, .*set task.episodes"),
    ((*VERIFIERS, "algorithm.credit=turn"), "algorithm.credit=turn trains each turn on a reward of its own"),
    ((*VERIFIERS, "trainer.warmup.steps=5"), "warmup.steps=5 needs demonstrations, and task.kind=verifiers has none"),
    (("task=gymnasium",), "task.env_id has no value, so the run cannot start: set task.env_id="),
    (
        ("task=gymnasium", "task.env_id=FrozenLake-v1", "reward=exact"),
        "reward.terms.exact compares .* and task=gymnasium scores itself, so the term would abstain",
    ),
    (
        ("task=gymnasium", "task.env_id=FrozenLake-v1", "task.history=0"),
        "task.history=0 is out of range, .* no frame is left to see",
    ),
    (("task.image_size=40",), "task.image_size=40 is not a multiple of 32, .*: set task.image_size=32"),
    (
        ("task.max_turns=4", "orchestrator.max_new_tokens=8"),
        "max_new_tokens=8 is too short .* = 8 letters, .* set orchestrator.max_new_tokens=9 or more",
    ),
    (("model.tiny.num_key_value_heads=3",), "model.tiny.num_attention_heads=4 .* num_key_value_heads=3"),
    (
        ("task=dataset", "task.path=rows.jsonl", "reward=exact", "task.columns.videos=clip"),
        r"columns\.videos=clip shows videos, and orchestrator\.renderer\.name=auto makes none, .*=template, or leave",
    ),
    (
        ("model.vlm.video.num_frames=65",),
        r"num_frames=65 is more than model\.vlm\.video\.max_frames=64, so every video .*max_frames=65, or",
    ),
    (
        ("model.vlm.video.max_frames=257",),
        r"max_frames=257 is more than model\.vlm\.video\.max_episode_frames=256, so .*max_episode_frames=257 or",
    ),
    (("model.vlm.positions=rope",), "model.vlm.positions=rope names no position function.* mrope, sequential"),
    (("model.vlm.freeze_vision=true", "model.vlm.freeze_language=true"), "freeze the whole model"),
    (("model/lora=all_linear", "model.vlm.freeze_language=true"), "freeze_language=true has no effect with model.lora"),
    (
        ("model=qwen3vl", "model.init=random", "model/size=2b", "model.vlm.family=polar_vl"),
        "model.init=random cannot build model.vlm.family=polar_vl",
    ),
    (("mode=play", "resume=/runs/mine"), "resume=/runs/mine names a run of mode=play, whose episodes are over"),
    (("mode=bench", "resume=/runs/mine"), "resume=/runs/mine names a run of mode=bench, whose steps are over"),
    (("mode=bench", "bench.steps=0"), "bench.steps=0 .* nothing is measured"),
    (("mode=bench", "task=program", "task.command=x", "algorithm.credit=turn"), "algorithm.credit=turn"),
    (("mode=play", "play.policy=randm"), r"play.policy=randm is neither one of person, random nor .* mean random\?"),
    (("mode=play", "play.policy=their_games:nobody"), "play.policy=their_games:nobody names a module that does not"),
    (
        ("mode=play", "play.policy=os.path:join"),
        r"play.policy=os.path:join cannot be called with messages and env alone",
    ),
    (("export.folder=there",), "export.folder=there has no effect with mode=rl"),
    (("mode=export",), "mode=export has no resume="),
    (
        ("resume=outputs/a",),
        "resume=outputs/a stands in a file .* trained from scratch: .* resume=outputs/a on",
    ),
    (
        ("mode=replay", "run=outputs/a", "step=3"),
        "mode=replay run=outputs/a step=3 stands in a file .* remove it",
    ),
    (("run=outputs/a",), "run=outputs/a has no effect with mode=rl, .*: drop run, or set mode=replay"),
    (("mode=sft", "trainer.warmup.steps=1", "step=3"), "step=3 has no effect with mode=sft"),
    (("against=a",), "against=a has no effect with mode=rl, .*: drop against, or set mode=doctor"),
    (("runs=[a,b]",), "runs=a,b has no effect with mode=rl, .*: drop runs, or set mode=compare"),
    (("mode=compare",), "mode=compare has no runs="),
    (
        ("model=qwen3vl", "model.init=random", "model/size=30b_a3b"),
        "another family .*=qwen3vl_moe",
    ),
    (("model.vlm.image_token=inf",), "model.vlm.image_token=inf is no image token of .*: set it to <.image_pad.>"),
    (
        ("model.vlm.video.token='<film>'",),
        "model.vlm.video.token=<film> is no video token of .*: set it to <.video_pad.>",
    ),
    (
        ("model.vlm.family=llava", "model.tiny=null", "model.name=x"),
        "family=llava is not known to have videos here, .*: set model.vlm.video=null and show",
    ),
    (
        ("model.vlm.video.min_pixels=2048", "model.vlm.video.max_pixels=1024"),
        "video.min_pixels=2048 is above model.vlm.video.max_pixels=1024",
    ),
    (("model=qwen3vl", "model.size.text.hidden_size=abc"), "hidden_size=abc is no size .* whole number from 1 to"),
    (("model=qwen3vl", "model.size.vision.depth=1e20"), r"model.size.vision.depth=1e\+20 is no size"),
    (("model=qwen3vl", "model.size.text.rms_norm_eps=null"), "rms_norm_eps=None is no size"),
    (("model=qwen3vl", "model.size.vision.deepstack_visual_indexes=[-1]"), r"deepstack_visual_indexes=\[-1\] is no"),
    (("model=qwen3vl", "model.size.text.rope_parameters=1"), "rope_parameters=1 is no size"),
    (("model/lora=all_linear", "model.lora.targets=[]"), r"model.lora.targets=\[\] gives no layer"),
    (("model/lora=all_linear", "model.lora.parts=[]"), r"model.lora.parts=\[\] gives no part adapters"),
    (("model/lora=all_linear", "model.lora.parts=[language_model,head]"), r"names the head, which gets no adapters"),
    (
        (
            *("model=qwen3vl", "~model/vlm", "model.name=some/text_model", "orchestrator.renderer.name=qwen3"),
            *("model/lora=all_linear", "model.lora.parts=[projector]"),
        ),
        "that a model without images",
    ),
    (("trainer.part_rates.projector=0",), "trainer.part_rates.projector=0.* would not learn"),
    (("model.tiny.hidden_size=65536", "model.tiny.intermediate_size=65536"), r"model.tiny has [\d,]+ parameters"),
    (("orchestrator.eval.target=-5",), "target=-5.0 is outside .* met before anything is learned"),
    (("orchestrator.eval.target=2",), "target=2.0 is outside .* never met"),
    (("model.tiny.vision_depth=100000000000000000000",), "model.tiny.vision_depth=1000.* at most 1024"),
    (("model.tiny.bpe_merges=9223372036854775807",), "model.tiny.bpe_merges=9223372036854775807 .* at most 100000"),
    (("trainer.eps=9e18",), "trainer.eps=9e.* 1e-30 or more and at most 1"),
    (("trainer.betas=[0.9,1.0]",), "trainer.betas=1.0 is out of range.* 0 or more and below 1"),
    (("model.device=1e18",), "model.device='1e.*18' cannot be used, .*: set model.device to auto, cpu, cuda or"),
    (("model.vlm.positions=",), "model.vlm.positions='' cannot be used, .* a name of letters"),
    (("inference=vllm", "inference.urls=['ftp://h']"), "inference.urls='ftp://h' cannot be used, .* http://host:port"),
    (("monitor.wandb.project=''",), "monitor.wandb.project='' cannot be used, .* one line that is not empty"),
    (("orchestrator.renderer=${seed}",), "orchestrator.renderer is 0 after references .* another type"),
    (("model.lora=${model.vlm}",), "model.lora is VLMConfig.* another type"),
    (("inference=vllm", "inference.urls=${seed}"), "inference.urls is 0 after references"),
    (("trainer.betas=${seed}",), "trainer.betas is 0 after references"),
    (("model.tiny.head_dim=6",), "model.tiny.head_dim=6"),
    (("model.tiny.vision_num_heads=3",), "vision_num_heads=3"),
    (("model.tiny.vision_hidden_size=40",), "model.tiny.vision_hidden_size=40"),
    (("model.tiny.deepstack_visual_indexes=[1]",), r"model.tiny.deepstack_visual_indexes=\[1\]"),
    (
        ("task=imported", "task.target=a.b:C", "++task.args.openai_api_key=x"),
        "task.args.openai_api_key looks like a secret",
    ),
    (("inference=vllm", "++inference.extra_args.api-key=x"), "inference.extra_args.api-key looks like .*VLLM_API_KEY"),
    (
        ("inference=vllm", "inference.urls=['http://me:secret@h:1']"),
        r"inference.urls\[0\] looks like a secret.*VLLM_API_KEY",
    ),
    (("model.name=https://me:hunter2@host/x",), "model.name looks like a secret.*HF_TOKEN"),
    (
        (*JUDGE, "++reward.terms.judge.extra_body.api_key=hunter2"),
        "reward.terms.judge.extra_body.api_key looks like a secret.*api_key_env",
    ),
    ((*JUDGE, "reward.terms.judge.url='http://me:pw@h/v1'"), "reward.terms.judge.url looks like a secret"),
    ((*JUDGE, "reward.terms.judge.api_key_env=sk-Abc123"), "judge.api_key_env=.* the name of an environment variable"),
    ((*JUDGE, "reward.terms.judge.url='http://h/v1?x=1'"), "judge.url=.* without user and query"),
    (
        ("task=dataset", "task.path=rows.jsonl", "reward=exact", "tool=[zoom]"),
        r"task.max_turns=1 leaves no turn for the answer after a call of tool=\[zoom\], .* set task.max_turns=4",
    ),
    (
        ("task=dataset", "task.path=rows.jsonl", "reward=exact", "task.max_turns=4"),
        r"task.max_turns=4 has no effect without tools, .* set task.max_turns=1, or choose tool=\[zoom\]",
    ),
    (
        ("task=small_print", "task.demonstrated_zooms=1"),
        r"task.demonstrated_zooms=1 shows calls of zoom in thousandths, .* choose tool=\[zoom\]",
    ),
    (("task=clip_direction",), "task.kind=clip_direction shows videos, .* set orchestrator/renderer=template"),
    (
        ("experiment=clip_tiny", "model.vlm.video=null"),
        "shows videos, and model.vlm.family=qwen3_vl takes none .* choose a model that takes videos",
    ),
    (("tool=[no_module:fn]",), "tool.fn.target=no_module:fn names a module that does not exist"),
    (("tool=[zoom]", "tool.zoom.size=4"), "tool.zoom.size=4 .* no processor takes an image of that size"),
    (("+trainer.pace=1",), "trainer.pace: there is no such key"),
    (("+pace=1",), "pace: there is no such key"),
    (("~inference",), "inference has no value"),
    (("trainer.seq_len=${nowhere}",), "Interpolation key 'nowhere' not found"),
]
