"""common.py: log-probabilities, sampling, models, precision, answers, data, the run folder."""

import copy
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import make
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config

import common
import gcpo
from common import Problem, Sample, extract_answer, same_answer

CPU = SimpleNamespace(device="cpu", dtype="float32", temperature=1.0, micro_tokens=4096)


# --------------------------------------------------------------------------- for all test modules


def tiny_problems(levels, number, split="train"):
    return [Problem(**row) for row in make.sum_problems(levels, split, number)]


def prompts(tok, n, levels=(1, 2, 3)):
    problems = tiny_problems(levels, n)
    return [tuple(ids) for ids in common.encode_questions(tok, [p.question for p in problems])]


def spy(monkeypatch, module, name):
    """Records the arguments of every call of module.<name>, and what it returned."""
    real, calls = getattr(module, name), []

    def recorded(*a, **k):
        found = real(*a, **k)
        calls.append((a, found))
        return found

    monkeypatch.setattr(module, name, recorded)
    return calls


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def check_metrics(names, metrics):
    """Every declared metric is among the logged names, and every number of an evaluation is told
    of in the entry of `eval/*`."""
    for declared in metrics:
        assert any(common.fnmatch(n, declared) for n in names), f"{declared} is never logged"
    told = metrics["eval/*"].replace("@k", "@2")
    for name in names:
        if name.startswith("eval/"):
            assert name.removeprefix("eval/").split("/level")[0] in told


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


GSM = [{"question": f"Ann has {i} figs and gets 2. How many?",
        "answer": f"She has {i}+2=<<{i}+2={i + 2}>>{i + 2} figs.\n#### {i + 2}"} for i in range(12)]


def word_tokenizer(pad_is_eos=False, bos=False, template=False):
    """A SentencePiece-free byte tokenizer in another layout than Qwen2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i + 3 for i, c in enumerate(alphabet)} | {"<s>": 0, "</s>": 1, "<pad>": 2}
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
        pad_token="</s>" if pad_is_eos else "<pad>")
    if template:
        tok.chat_template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
                             "{% endfor %}{% if add_generation_prompt %} [assistant] {% endif %}")
    return tok


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """-> a function of tokenizer options: a random-weights Llama checkpoint's folder."""
    def make(**kw):
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            bos_token_id=0, eos_token_id=1, pad_token_id=None)).save_pretrained(folder)
        word_tokenizer(**kw).save_pretrained(folder)
        return str(folder)
    return make


# ---------------------------------------------------------------------------- log-probabilities


def full_logps(model, samples, temperature):
    """The plain way: every logit, one row at a time, no padding. -> log-probs, entropies, (T,)"""
    logp, entropy = [], []
    for s in samples:
        logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0, len(s.prompt) - 1:-1]
        logits = logits.index_fill(
            1, torch.tensor(model.generation_config.suppress_tokens or [], dtype=int), -1e4)
        policy = torch.distributions.Categorical(logits=logits / temperature)
        logp.append(policy.log_prob(torch.tensor(s.tokens)))
        entropy.append(policy.entropy())
    return torch.cat(logp), torch.cat(entropy)


@pytest.mark.parametrize("head_learns", [True, False])  # LoRA leaves it as it is
@pytest.mark.parametrize("positions", [10**6, 7])  # per chunk of the LM head
def test_log_probs_entropies_and_gradients_are_those_of_full_logits(tiny, monkeypatch, positions,
                                                                    head_learns):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    model.get_output_embeddings().requires_grad_(head_learns)
    model.generation_config.suppress_tokens = [tok.convert_tokens_to_ids("7")]
    V, saved = model.config.vocab_size, []
    monkeypatch.setattr(common, "HEAD_FLOATS", positions * V)
    torch.manual_seed(0)
    samples = common.sample(model, tok, prompts(tok, 3), 2, 20, 1.5)
    ids, mask = common.collate(samples, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.shape) or x, lambda x: x):
        found = common.response_logps(model, ids, mask, 0.7, with_entropy=True)
    assert saved and not [s for s in saved if s[-1:] == (V,)], "(n, L, V) never exists"
    for x in found:
        assert x.shape == mask.shape and x.dtype == torch.float32 and (x[mask == 0] == 0).all()
    found, full = [x[mask > 0] for x in found], full_logps(model, samples, 0.7)
    a, b = torch.randn(2, len(full[0]))
    grads = []
    for logp, entropy in (found, full):
        model.zero_grad()
        (a * logp + b * entropy).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for _, p in common.trained(model)]))
    for x, y in zip((*found, grads[0]), (*full, grads[1])):
        assert torch.allclose(x, y, atol=1e-4 * max(.1, y.abs().max().item()))
    assert (model.get_output_embeddings().weight.grad is None) != head_learns
    assert not common.response_logps(model, ids, mask, 0.7)[1].any(), "nobody asked for it"


def test_sampler_and_trainer_log_probs_agree(tiny):
    model, tok = tiny
    torch.manual_seed(0)
    samples = common.sample(model, tok, prompts(tok, 4), 6, 30, 1.6)
    assert len({len(s.prompt) for s in samples}) > 1, "left padding is not exercised"
    samples += common.as_samples(tok, [samples[0].prompt], ["7"])  # no policy sampled this one
    ids, mask = common.collate(samples, "cpu")
    logp, entropy = common.response_logps(model, ids, mask, 1.6, with_entropy=True)
    for r, s in enumerate(samples[:-1]):
        assert logp[r, mask[r] > 0].tolist() == pytest.approx(s.logps, abs=2e-5)
        assert entropy[r].sum().item() == pytest.approx(s.entropy, abs=1e-3)
    for n in (1, 150, 10**6):
        cfg = SimpleNamespace(device="cpu", temperature=1.6, micro_tokens=n)
        assert torch.allclose(common.batch_logps(model, samples, cfg), logp, atol=2e-5)
    diff = common.mismatch(logp, mask, samples)
    assert len(diff) == sum(len(s.logps) for s in samples) and diff.max() < 2e-5
    assert common.mismatch(logp - 1, mask, samples).tolist() == pytest.approx([1] * len(diff), 1e-4)


@pytest.mark.parametrize("together, only", [
    (1, None), (2, None), (1, [*range(5, 29)]), (2, [*range(8, 30)]), (3, [33, 30, 31, 3, 4, 5])])
def test_micro_batches_hold_every_row_once_within_the_budget(together, only):
    samples = [Sample((1,) * (1 + i % 5), [2] * (1 + i * 7 % 11), "", True) for i in range(40)]
    cfg, longest = SimpleNamespace(device="cpu", micro_tokens=60), []
    parts = list(common.micro_batches(samples, cfg, only, together))
    assert not list(common.micro_batches(samples, cfg, [], together))
    only = list(range(40)) if only is None else only
    units = [only[i:i + together] for i in range(0, len(only), together)]
    for rows, ids, mask in parts:
        size = [len(samples[i].prompt) + len(samples[i].tokens) for i in rows]
        assert ids.shape == mask.shape == (len(rows), max(size))
        assert ids.numel() <= 60 or len(rows) == together
        assert mask.sum(1).tolist() == [len(samples[i].tokens) for i in rows]
        for i in range(0, len(rows), together):
            units.remove(rows[i:i + together])
            longest.append(max(size[i:i + together]))
    assert not units and longest == sorted(longest), "rows of similar length are together"
    assert len(parts) <= 1 + 2 * sum(longest) * together / 60, "the budget is used"


def test_mask_is_positional():
    # 7 is pad, EOS and an ordinary id here: only positions decide
    samples = [Sample((7, 7), [7, 3, 7], "", True), Sample((5,), [7], "", True)]
    ids, mask = common.collate(samples, "cpu")
    assert mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert ids[0].tolist() == [7, 7, 7, 3, 7] and ids[1, :2].tolist() == [5, 7]


# ------------------------------------------------------------------------------------- sampling


def test_greedy_equals_generate(tiny):
    model, tok = tiny
    asked = prompts(tok, 6, (1, 2, 3, 4))
    ours = common.sample(model, tok, asked, 1, 40, 0)
    width = max(map(len, asked))
    ids = torch.tensor([[tok.pad_token_id] * (width - len(p)) + list(p) for p in asked])
    mask = (torch.arange(width) >= width - torch.tensor([[len(p)] for p in asked])).long()
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(
        max_new_tokens=40, do_sample=False, pad_token_id=tok.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id))[:, width:]
    for s, row in zip(ours, out.tolist()):
        assert row[:len(s.tokens)] == s.tokens
        assert s.finished == (s.tokens[-1] == tok.eos_token_id)


def test_samples_follow_the_softmax_at_the_temperature():
    torch.manual_seed(0)
    logits, n = torch.tensor([[2.0, 0, -1, 1, -float("inf"), 0.5]]), 60_000
    for temperature in (1.0, 0.5):
        token, logp, entropy = common.draw(logits.expand(n, -1), temperature)
        p = (logits[0] / temperature).softmax(-1)
        counts = torch.bincount(token, minlength=6)
        assert counts[4] == 0, "a token of probability zero was drawn"
        live = p > 0
        chi2 = ((counts[live] - n * p[live]) ** 2 / (n * p[live])).sum()
        assert chi2 < 18.5  # 4 degrees of freedom: exceeded once in 1000
        assert torch.allclose(logp.exp(), p[token], atol=1e-6)
        assert entropy[0].item() == pytest.approx(-(p[live] * p[live].log()).sum().item(), 1e-5)


@pytest.mark.parametrize("uniform,token", [(0.0, 1), (1.0, 2)])  # the ends of the interval
def test_draw_never_takes_an_impossible_token(uniform, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **k: torch.full(shape, uniform))
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]])
    assert common.draw(logits, 1.0)[0].item() == token


def test_groups_stay_in_prompt_order_whatever_the_chunks(tiny, monkeypatch):
    model, tok = tiny
    asked, greedy = prompts(tok, 7, (3, 1, 2)), []
    calls = spy(monkeypatch, common, "decode")
    for rows, tokens in ((2, 2**16), (5, 2**16), (256, 2**16), (256, 200), (256, 1)):
        monkeypatch.setattr(common, "ROWS", rows)
        monkeypatch.setattr(common, "KV_TOKENS", tokens)
        calls.clear()
        found = common.sample(model, tok, asked, 2, 6, 1.0)
        longest = 6 + max(map(len, asked))
        assert all(len(a[2]) == 1 or 2 * len(a[2]) <= min(rows, tokens / longest) for a, _ in calls)
        assert (len(calls) == 1) == (rows > 5 and tokens > 200), "as many as may be"
        assert [s.prompt for s in found] == [p for p in asked for _ in range(2)]
        assert all(1 <= len(s.tokens) <= 6 and len(s.logps) == len(s.tokens) for s in found)
        assert all(s.finished or len(s.tokens) == 6 for s in found)
        greedy.append([s.text for s in common.sample(model, tok, asked, 1, 30, 0)])
    assert all(texts == greedy[0] for texts in greedy) and len({*greedy[0]}) > 5


# ------------------------------------------------------------------- tokenizers and checkpoints


@pytest.mark.parametrize("bos,template,text", [
    (False, False, "How many?\n"), (True, False, "<s>How many?\n"),
    (False, True, "<s>[user] How many? [assistant] "),
    (True, True, "<s>[user] How many? [assistant] ")])
def test_bos_comes_once(bos, template, text):
    tok = word_tokenizer(bos=bos, template=template)
    assert tok.decode(common.encode_questions(tok, ["How many?"])[0]) == text
    golden, = common.as_samples(tok, [(0, 5)], ["2"])
    assert golden.tokens == [*tok("2", add_special_tokens=False).input_ids, tok.eos_token_id]
    assert (golden.prompt, golden.text, golden.finished) == ((0, 5), "2", True)


def test_prompts_never_end_in_eos():
    tok = word_tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert tok.decode(tok("x").input_ids) == "<s>x</s>"
    assert tok.decode(common.encode_questions(tok, ["How many?"])[0]) == "<s>How many?\n"


@pytest.mark.parametrize("kw", [{}, {"pad_is_eos": True}, {"bos": True}, {"template": True}])
def test_any_checkpoint_loads_and_samples(llama_folder, kw):
    model, tok = common.load_model(llama_folder(**kw), CPU)
    asked = common.encode_questions(tok, ["How many?", "And how many figs?"])
    samples = common.sample(model, tok, asked, 3, 12, 1.0)
    ids, mask = common.collate(samples, "cpu")
    logp, _ = common.response_logps(model, ids, mask, 1.0)
    for r, s in enumerate(samples):
        assert logp[r, mask[r] > 0].tolist() == pytest.approx(s.logps, abs=1e-5)
        assert mask[r].sum() == len(s.tokens)  # an EOS that is also the pad id is counted
    assert common.trained_prompt(model, "instruction", "x") == "x"


@pytest.mark.parametrize("eos, ids", [(None, [1]), (1, [1]), (7, [1, 7]), ([9, 7], [1, 7, 9])])
def test_a_response_ends_at_the_end_tokens_of_tokenizer_and_checkpoint(llama_folder, eos, ids):
    path = Path(llama_folder(), "generation_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    model, tok = common.load_model(str(path.parent), CPU)
    assert model.generation_config.eos_token_id == ids
    ended = [s for s in common.sample(model, tok, [(5, 6)], 64, 40, 2.0) if s.finished]
    assert {s.tokens[-1] for s in ended} <= set(ids) and len(ended) > 2
    assert not {t for s in ended for t in s.tokens[:-1]} & set(ids)


def test_logit_processing_after_the_head_is_refused(tmp_path, capsys):
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=.1, pad_token_id=2,
        initializer_range=1.0)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_model(str(tmp_path), CPU)
    assert "LM head" in capsys.readouterr().err


@pytest.mark.parametrize("name,hub_id", [
    ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"), ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ("DeepSeek-R1-Distill-Qwen-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"), ("a/b", "a/b")])
def test_bare_names(name, hub_id, monkeypatch, capsys):
    def from_pretrained(path, **_):
        raise OSError(f"asked for {path}")
    monkeypatch.setattr(common, "AutoConfig", SimpleNamespace(from_pretrained=from_pretrained))
    with pytest.raises(SystemExit):
        common.load_model(name, CPU)
    assert capsys.readouterr().err == f"error: --model {name}: asked for {hub_id}\n"


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_is_the_untrained_model(llama_folder, lora):
    model, tok = common.load_model(llama_folder(), CPU, lora)
    reference, samples = common.frozen_reference(model), common.as_samples(tok, [(5, 6)], ["####"])
    before = common.batch_logps(model, samples, CPU)
    opt = torch.optim.AdamW([p for _, p in common.trained(model)])
    for step in (1, 2):  # B of LoRA starts at zero, so A moves from the second step on
        common.sft_step(model, samples, opt, CPU, step, [1e-2])
    assert (common.batch_logps(model, samples, CPU) - before).abs().max() > 1e-3
    assert torch.allclose(common.reference_logps(model, reference, samples, CPU), before, atol=1e-6)
    assert all("lora" in name for name, _ in common.trained(model)) == lora == model.training
    if lora:
        assert common.causal_lm(model).is_activation_checkpointing
        assert len(common.sample(model, tok, [(5, 6)], 2, 4, 1.0)) == 2 and model.training


# ------------------------------------------------------------------------- memory and precision


@pytest.mark.parametrize("shape, gigabytes", [
    ((1536, 8960, 28, 12), "27.8"), ((896, 4864, 24, 14), None)])  # Qwen2.5-1.5B and -0.5B
def test_what_the_gpu_cannot_hold_is_refused_before_it_is_loaded(shape, gigabytes, monkeypatch,
                                                                 tmp_path, capsys):
    hidden, intermediate, layers, heads = shape
    Qwen2Config(vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
                tie_word_embeddings=True).save_pretrained(tmp_path)  # no weights, no tokenizer
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=24 * 2**30))
    cfg = SimpleNamespace(device="cuda:0", dtype="bfloat16")
    for lora, flag in ((False, "--model"), (True, "--model"), (False, "--judge")):
        with pytest.raises(SystemExit):
            common.load_model(str(tmp_path), cfg, lora, flag)
        error = capsys.readouterr().err
        refused = f"{gigabytes} GB" in error and "--lora" in error and "25.8 GB" in error
        assert refused == bool(gigabytes and flag == "--model" and not lora), error


@pytest.fixture(scope="module")
def bfloat16(worlds):
    """-> (model, tokenizer, cfg) of tiny/arithmetic under --dtype bfloat16"""
    cfg = common.Config(device="cpu", dtype="bfloat16")
    return *common.load_model("tiny", cfg), cfg


def test_only_what_is_trained_is_float32(bfloat16, llama_folder):
    model, _, cfg = bfloat16
    adapted, _ = common.load_model(llama_folder(), cfg, lora=True)
    reference = common.frozen_reference(model)
    for parameters, dtype in (
            (model.parameters(), torch.float32), (reference.parameters(), torch.bfloat16),
            (common.load_model("tiny", cfg, flag="--golden")[0].parameters(), torch.bfloat16),
            (common.load_model("tiny", cfg, flag="--judge")[0].parameters(), torch.bfloat16),
            ([p for _, p in common.trained(adapted)], torch.float32),
            ([p for p in adapted.parameters() if not p.requires_grad], torch.bfloat16)):
        assert {p.dtype for p in parameters} == {dtype}
    assert common.trained(model) and not common.trained(reference)


def test_the_reference_in_bfloat16_knows_its_positions(bfloat16):
    reference = common.frozen_reference(bfloat16[0])
    assert list(reference.buffers()) and {b.dtype for b in reference.buffers()} == {torch.float32}
    for ours, theirs in zip(bfloat16[0].buffers(), reference.buffers()):
        assert torch.equal(ours, theirs)


def test_an_lm_head_with_a_bias_in_bfloat16(bfloat16):
    model, tok, _ = copy.deepcopy(bfloat16[0]), *bfloat16[1:]
    samples = common.as_samples(tok, prompts(tok, 2), ["#### 2", "7"])
    batch, (token, *_) = common.collate(samples, "cpu"), samples[0].tokens
    before = common.response_logps(model, *batch, 1.0)[0]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    assert torch.equal(common.response_logps(model, *batch, 1.0)[0], before)
    model.lm_head.bias.data[token] = 20.0
    logp = common.response_logps(model, *batch, 1.0)[0]
    logp.sum().backward()
    assert (logp - before).abs().max() > 1 and model.lm_head.bias.grad.abs().sum() > 0


def test_float32_weights_take_steps_that_bfloat16_has_not(bfloat16):
    model, tok, cfg = copy.deepcopy(bfloat16[0]), *bfloat16[1:]
    before = flat(model)
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    samples = common.as_samples(tok, prompts(tok, 8), ["1+1=2\n#### 2"] * 8)
    common.sft_step(model, samples, opt, cfg, 1, [1e-6])
    moved = (flat(model) - before).abs()
    assert moved.median().item() == pytest.approx(1e-6, rel=.1)
    assert (flat(model).bfloat16() != before.bfloat16()).float().mean() < .02


def test_sampler_and_trainer_agree_to_bfloat16_rounding(bfloat16, tiny, tmp_path):
    model, tok, cfg = bfloat16
    seen = set()
    hook = model.lm_head.register_forward_hook(lambda head, x, logits: seen.add(logits.dtype))
    torch.manual_seed(0)
    samples = common.sample(model, tok, prompts(tok, 16), 4, 30, 1.5)
    ids, mask = common.collate(samples, "cpu")
    diff = {}
    for lm in (model, common.frozen_reference(model), tiny[0]):
        logp, _ = common.response_logps(lm, ids, mask, 1.5)
        diff[lm] = common.mismatch(logp, mask, samples).mean()
        assert logp.dtype == torch.float32 and 1e-5 < diff[lm] < .01
    hook.remove()
    assert diff[model] < diff[tiny[0]] and seen == {torch.bfloat16}
    flags = "--dtype bfloat16 --steps 1 --prompts 8 --group 4 --max_new_tokens 24 --eval_size 4"
    gcpo.main([*flags.split(), "--kl_beta", ".01", "--out", str(tmp_path)])
    assert 0 < jsonl(tmp_path / "metrics.jsonl")[-1]["policy/mismatch"] < .01


def test_sampling_casts_every_weight_once(bfloat16, monkeypatch):
    """Autocast keeps its copies until its context ends, but not in inference mode."""
    model, tok, _ = bfloat16
    weights = {p.data_ptr(): [] for p in model.model.layers.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if getattr(out, "dtype", None) == torch.bfloat16 and hasattr(args[0], "data_ptr"):
                weights.get(args[0].data_ptr(), []).append(f)
            return out

    monkeypatch.setattr(common, "ROWS", 4)
    with Casts():  # four chunks of prompts, twenty tokens each
        samples = common.sample(model, tok, prompts(tok, 7), 2, 20, 1.0)
    assert len(weights) == 14 and {len(casts) for casts in weights.values()} == {1}
    monkeypatch.setattr(common, "HEAD_FLOATS", 2 * model.config.vocab_size)
    weights = {model.lm_head.weight.data_ptr(): []}
    with Casts():  # a chunk for every two tokens
        logp, _ = common.response_logps(model, *common.collate(samples, "cpu"), 1.0)
        logp.sum().backward()
    assert [len(casts) for casts in weights.values()] == [1]


# ------------------------------------------------------------------------------------- training


def test_update_warms_up_clips_and_refuses_nan(capsys):
    w = torch.nn.Linear(1, 1, bias=False)
    opt, cfg = torch.optim.AdamW(w.parameters()), SimpleNamespace(lr=.8, warmup_steps=4)
    for step, lr in ((1, .2), (2, .4), (4, .8), (9, .8)):
        w.weight.grad = torch.full((1, 1), 7.0)
        assert common.update(opt, cfg, step) == pytest.approx(7)
        assert opt.param_groups[0]["lr"] == pytest.approx(lr) and w.weight.grad is None
        if step == 1:  # AdamW's first moment holds a tenth of the gradient: 1, not 7
            assert opt.state[w.weight]["exp_avg"].item() == pytest.approx(.1)
    kept = flat(w).clone()
    for grad in (math.nan, math.inf):
        w.weight.grad = torch.full((1, 1), grad)
        with pytest.raises(SystemExit, match="2"):
            common.update(opt, cfg, 3)
        assert "step 3" in capsys.readouterr().err and torch.equal(flat(w), kept)


def test_the_optimizer_has_what_is_trained_and_decays_no_weight(policy):
    head = torch.nn.Linear(1, 1)
    head.bias.requires_grad_(False)
    before, opt = head.weight.item(), common.adamw(.5, policy, head)
    assert [len(group["params"]) for group in opt.param_groups] == [len(common.trained(policy)), 1]
    head.weight.grad = torch.zeros(1, 1)
    opt.step()
    assert head.weight.item() == before and opt.param_groups[0]["lr"] == .5


@pytest.mark.parametrize("micro_tokens", [1, 10**6])
def test_a_step_of_sft_is_cross_entropy_per_token(policy, tiny, micro_tokens):
    samples = common.as_samples(tiny[1], prompts(tiny[1], 3), ["1+1=2\n#### 2", "7", "#### 12"])
    loss = -full_logps(policy, samples, 1.0)[0].mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    policy.zero_grad()
    opt, cfg = torch.optim.AdamW(policy.parameters()), SimpleNamespace(
        device="cpu", micro_tokens=micro_tokens)
    assert common.sft_step(policy, samples, opt, cfg, 1, [1e-3]) == pytest.approx(
        (loss.item(), norm), rel=1e-4)
    assert -full_logps(policy, samples, 1.0)[0].mean() < loss


# ------------------------------------------------------------------------------ answer checking


@pytest.mark.parametrize("text,answer", [
    ("1+1=2\n#### 2", "2"), ("#### 1,080\n", "1,080"), ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("The answer is 5.", "5"), ("So, the answer is <203>.", "203"), ("Answer: 3.5 m", "3.5 m"),
    ("#### 3\nno:\n#### 4", "4"), ("\\boxed{1} then\n#### 2", "2"), ("#### 2\n\\boxed{1}", "1"),
    ("The final answer is: \\boxed{7}", "7"), ("the answer is $18", "$18"), ("just 7", None),
    ("", None), ("####", None), ("####   ", None), ("\\boxed{unclosed", None),
    ("\\boxed {a{b}c}", "a{b}c"), ("**Answer:** 12", "12"), ("Answer: x = 3. Done.", "x = 3"),
    # a remark or a heading does not override an answer
    ("\\boxed{44}. Check: ok, so our answer is correct.", "44"),
    ("#### 44\nThis means the answer is right.", "44"),
    ("\\boxed{7}\n\n#### Check\n3 + 4 = 7", "7"),
    ("The answer is 5.\n\n#### Note\nAll steps were checked.", "5"),
    ("#### Step 1\n2+3=5\n#### Step 2\n5+1=6\n\n#### 6", "6"), ("#### 6\n#### Check\nok", "6"),
    ("Is the answer 5? No: \\boxed{6}\nThe answer is not 5.", "6"),
    # but another answer does
    ("\\boxed{44}. No, 45: the answer is 45.", "45"), ("#### 44\nThe answer is $x^2$.", "$x^2$"),
    ("\\boxed{3} fails. The answer is $\\boxed{4}$.", "4"), ("\\boxed{2} or \\boxed{3}", "3"),
    # as models write
    ("The final answer is $\\boxed{10}$. I hope it is correct.", "10"), ("### Answer: 42", "42"),
    ("**Final Answer**\n\nThe answer is **12**.", "12"), ("> **#### 12**", "12"),
    ("#### The final answer is: 42", "42"), ("The answer is (B).", "(B)"), ("Answer:\n42", "42"),
    ("The answer is 5 apples. The answer is right, since 2+3=5.", "5 apples"),
    ("The answer is 1,234.", "1,234"), ("He had 5 #### left over. \\boxed{9}", "9"),
    ("##### 5\n\\boxed{6}\n##### 7", "6"), ("\\boxed{\\text{Eve}}", "\\text{Eve}")])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("given,truth,equal", [
    ("18", "18", True), ("1,080", "1080", True), ("$18", "18", True), ("18 dollars", "18", True),
    ("18.0", "18", True), ("18.00", "18", True), ("50%", "50", True), ("-3", "-3", True),
    ("3", "-3", False), ("3/4", "0.75", True), ("1 1/2", "1.5", True), ("-1 1/2", "-1.5", True),
    (".5", "0.5", True), ("0.333", "1/3", False), ("1,2", "12", False), ("12", "1", False),
    ("18", "18.5", False), ("5/0", "5", False), ("", "5", False), (None, "5", False),
    ("five", "5", False), ("5 apples", "5", True), ("5 6", "56", False), ("x = 5", "5", True),
    ("109,200,000", "109200000", True), ("1e3", "1000", False), ("nan", "nan", True),
    ("\\frac{1}{2}", "0.5", True), ("\\frac{14}{3}", "\\dfrac{14}{3}", True),
    ("p-q", "p - q", True), ("q-p", "p - q", False), ("\\text{Evelyn}", "Evelyn", True),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
    ("(3, \\frac{\\pi}{3})", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
    ("3\\sqrt{13}", "\\sqrt{117}", True), ("90", "90^\\circ", True), ("6-5i", "6 - 5i", True),
    ("$18$", "18", True), ("\\(18\\)", "18", True), ("$x = 5$", "5", True), ("$2$", "$2$", True),
    ("$\\frac12$", "\\frac{1}{2}", True), ("-$5", "-5", True), ("+5", "5", True),
    ("\u22125", "-5", True), ("2x", "2", False), ("3i", "3", False), ("2k", "2", False),
    ("5 m", "5", True), ("$18", "18.0", True), ("9" * 5000, "9", False), ("\\" * 3000, "9", False),
    ("1{,}080", "1080", True), ("1,\\!080", "1080", True), ("\\$1,\\!080", "1{,}080", True),
    ("1{,}080", "1081", False), ("2516_8", "2516_{8}", True), ("2516_9", "2516_8", False),
    ("x_2 = {5}", "5", True), ("2516_{9}", "2516_8", False),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100", True),
    ("\\begin{pmatrix}\n\\dfrac{1}{2} \\\\ 2\n\\end{pmatrix}",
     "\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", True),
    ("1+x+x^2+x^3+x^4+x^5+x^6+x^7+x^8", "x^8+x^7+x^6+x^5+x^4+x^3+x^2+x+1", True),
    ("(x+1)^3(x+2)^3(x+3)^3", "(x+3)^3(x+1)^3(x+2)^3", True)])
def test_same_answer(given, truth, equal):
    assert same_answer(given, truth) is equal


# ------------------------------------------------------------------------ evaluation and voting


@pytest.mark.parametrize("answers, weights, winners", [
    (["1", "2", "2.0", None], None, {1, 2}), (["1", "2"], None, {0}), ([None, "3"], None, {1}),
    ([None, None], None, {0}), (["1", "2", "2"], [.9, .3, .3], {0}),
    (["1", "2", "2"], [.5, .3, .3], {1, 2}),
    (["1", "2", "2"], [.6, .3, .3], {1, 2})])  # of equal sums the larger class
def test_votes(answers, weights, winners):
    samples = [Sample((), [1], f"#### {a}" if a else "", True) for a in answers]
    right, k = [i in winners for i in range(len(answers))], len(answers)
    assert common.vote(samples, right, k, weights) == 1
    right, weights = right + [not r for r in right], weights and weights * 2
    assert common.vote(samples * 2, right, k, weights) == .5


def test_evaluation_numbers(tiny, monkeypatch):
    problems = [Problem("a", "1", level="1"), Problem("b", "2", level="2")]
    # greedy: right, wrong. 4 samples: a right, wrong, right, right; b 5, 5, right, none
    drawn = ["#### 1", "#### 3", "#### 1.0", "#### 1", "#### 5", "#### 5", "#### 2", "none"]
    script = iter([["#### 1", "#### 9"], drawn])
    monkeypatch.setattr(common, "sample", lambda *a, **k: [
        Sample((), [1], t, True) for t in next(script)])
    cfg = SimpleNamespace(max_new_tokens=8, eval_samples=4, temperature=1.0, device="cpu")
    result, samples, right = common.evaluate(
        *tiny, problems, cfg, lambda text, p: same_answer(extract_answer(text), p.answer))
    assert result == {"accuracy": .5, "accuracy/level1": 1, "accuracy/level2": 0, "mean@4": .5,
                      "pass@4": 1, "maj@4": .5}
    assert [s.text for s in samples] == drawn and right == [1, 0, 1, 1, 0, 0, 1, 0]


def test_evaluation_leaves_the_training_generator_alone(tiny):
    problems = common.encode_prompts(tiny_problems((1,), 4, "test"), *tiny, "", 8, "test")
    cfg = SimpleNamespace(max_new_tokens=8, eval_samples=3, temperature=1.0, device="cpu")
    before = torch.get_rng_state()
    first = common.evaluate(*tiny, problems, cfg, lambda t, p: p.answer in t)
    assert torch.equal(torch.get_rng_state(), before)
    assert common.evaluate(*tiny, problems, cfg, lambda t, p: p.answer in t) == first


# ----------------------------------------------------------------------------------------- data


def test_problems_are_a_function_of_their_position():
    problems = list(range(7))
    first = common.take(problems, 30, {"position": 0}, 3)
    assert sorted(first[:7]) == problems and sorted(first[7:14]) == problems
    assert first[:7] != first[7:14]
    state = {"position": 11}
    assert [common.take(problems, n, state, 3) for n in (4, 0, 9)] == [
        first[11:15], [], first[15:24]]
    assert state == {"position": 24}
    assert common.take(problems, 14, {"position": 0}, 4) != first[:14]


def load(path):
    return common.to_problems(common.read_rows(common.Config, path, "train", "--dataset"), path)


def test_gsm8k_rows_in_every_kind_of_file(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.json").write_text(json.dumps(GSM, indent=1))
    Dataset.from_list(GSM).to_parquet(tmp_path / "a.parquet")
    problems = load(write(tmp_path / "a.jsonl", GSM))
    assert problems[3].answer == "5" and problems[3].solution == "She has 3+2=5 figs.\n#### 5"
    assert load(str(tmp_path / "a.json")) == load(str(tmp_path / "a.parquet")) == problems


@pytest.mark.parametrize("row,problem", [
    ({"problem": "q", "answer": 70, "id": "0"}, ("q", "70", "")),
    ({"question": "q", "answer_cot": "the answer is <4>.", "answer_value": "4.0"},
     ("q", "4.0", "the answer is <4>.")),
    ({"problem": "q", "solution": "so $\\boxed{3}$", "level": 2}, ("q", "3", "so $\\boxed{3}$")),
    ({"Body": "b", "Question": "x", "question_concat": "b x", "Answer": "2"}, ("b x", "2", "")),
    ({"prompt": "q", "final_answer": "x"}, ("q", "x", ""))])
def test_columns_are_recognised(row, problem):
    p, = common.to_problems([row], "--dataset x")
    assert (p.question, p.answer, p.solution) == problem


def test_held_out_rows_are_never_trained_on(tmp_path):
    cfg = common.Config(dataset=write(tmp_path / "a.jsonl", GSM), eval_size=0)
    train, held_out = common.load_problems(cfg)
    assert len(held_out) == 2 and len(train) == 10
    cfg.eval_dataset = write(tmp_path / "b.jsonl", GSM[:4])
    train, held_out = common.load_problems(cfg)
    assert len(held_out) == 4 and len(train) == 8
    assert not {p.question for p in train} & {p.question for p in held_out}
    cfg.eval_size = 3
    assert len(common.load_problems(cfg)[1]) == 3


@pytest.mark.parametrize("dataset, solution, form", [
    ("x.jsonl", "#### 2", common.HASHES), ("x.jsonl", "\\boxed{2}", common.BOXED),
    ("gsm8k", "#### 2", common.HASHES), ("math500", "", common.BOXED)])
def test_instructions_ask_for_the_form_of_the_solutions(llama_folder, tiny_folder, monkeypatch,
                                                        dataset, solution, form):
    monkeypatch.setattr(common, "load_problems", lambda cfg: (
        [Problem("Q?", "2", solution)], [Problem("P?", "2", solution)]))
    cfg = common.Config(model=llama_folder(), dataset=dataset, device="cpu", dtype="float32",
                        max_new_tokens=8)
    for model, template, instruction, prompt in (
            (cfg.model, None, form, f"Q?\n{form}\n"),
            (cfg.model, "Asked: {{ messages[0].content }}", "", "Asked: Q?"),
            (tiny_folder, "x", "", "<|user|>Q?<|assistant|>")):  # it was trained with another
        cfg.model = model
        _, tok, train, held_out, found = common.set_up(cfg, template)
        assert (found, tok.decode(train[0].prompt)) == (instruction, prompt)
        assert tok.decode(held_out[0].prompt) == prompt.replace("Q?", "P?")


def test_prompts_that_do_not_fit_are_left_out(tiny, capsys):
    asked = [Problem("a", "1"), Problem("a " * 200, "1")]  # in a context of 256 tokens
    assert common.encode_prompts(asked, *tiny, "", 200, "training") == asked[:1]
    assert "training: 1 of 2 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        common.encode_prompts(asked, *tiny, "", 256, "training")


def test_hub_ids_configs_and_test_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        parts = {"openai/gsm8k": ("train", "test"), "HuggingFaceH4/MATH-500": ("test",),
                 "a/b": ("train", "test"), "a/c": ("train",)}[name]
        return {s: [{"question": f"{s} {i}", "answer": str(i)} for i in range(20)] for s in parts}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, held_out in (("gsm8k", "test"), ("math500", None), ("a/b", "test"), ("a/c", None)):
        cfg = common.Config(dataset=name, eval_size=0)
        train, test = common.load_problems(cfg)
        assert len(train) + len(test) == (40 if held_out else 20)
        assert all(p.question.startswith(held_out or "t") for p in test)
    assert asked[0] == ("openai/gsm8k", "main")


# ----------------------------------------------------------------------------------- run folder


def test_a_product_is_made_once_and_whole(tmp_path):
    def broken(to):
        to.mkdir()
        (to / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError):
        common.product(tmp_path / "run" / "sft", broken)
    assert not (tmp_path / "run" / "sft").exists()
    for _ in range(2):  # the second is not made
        path = common.product(f"{tmp_path}/run/sft", lambda to: to.mkdir() or (
            to / f"made as {to.name}").write_text(""))
    assert path == tmp_path / "run" / "sft" and [p.name for p in path.iterdir()] == [
        "made as sft.new"]


METRICS = {"part/*": "of the toy", "eval/*": "accuracy"}


def toy(out, resume="", steps=6):
    """A run of a model that learns from random numbers. -> the Run, the weights"""
    cfg = gcpo.Config(device="cpu", out=str(out), resume=str(resume), save_every=2)
    run = common.Run(cfg, "gcpo", METRICS, {})
    run.draw_curves = lambda: None
    torch.manual_seed(0)
    random.seed(0)
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=.1)
    state = run.start(model, opt, lambda: {"accuracy": model.weight.sum().item()}, mine=0)
    for _ in run.steps(steps):
        loss = (model(torch.randn(4, 3)) - random.random()).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        state["mine"] += 1
        run.add({"part/loss": loss})
        run.end_step([{"response": str(state["mine"])}])
    return run, flat(model)


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoint").iterdir())


def test_what_is_logged_is_the_mean_of_all_that_was_added(tmp_path, capsys):
    run, _ = toy(tmp_path, steps=0)
    run.add({"part/mean": [[1.0, 2.0], [3.0, 6.0]], "part/share": [True, False, False, True]})
    run.add({"part/mean": torch.tensor(8.0, requires_grad=True), "part/none": torch.zeros(0)})
    run.add({"part/share": [], "part/one": torch.tensor([1, 2], dtype=torch.bfloat16)})
    run.log()
    run.add({"part/mean": 1})
    run.log()
    assert jsonl(tmp_path / "metrics.jsonl")[1:] == [
        {"step": 0, "part/mean": 4, "part/share": .5, "part/one": 1.5}, {"step": 0, "part/mean": 1}]
    with pytest.raises(KeyError, match="typo"):
        run.add({"typo": 1.0})
    run.add({"part/mean": [1.0, math.nan]})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run.log()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: step 0: ") and error.count("\n") == 1
    assert "part/mean" in error and len(jsonl(tmp_path / "metrics.jsonl")) == 3


def test_the_last_two_checkpoints_stay_and_a_run_goes_on_exactly(tmp_path, capsys):
    whole, r = tmp_path / "whole", tmp_path / "r"
    _, weights = toy(whole)
    assert checkpoints(whole) == ["step_000004.pt", "step_000006.pt"]
    shutil.copytree(whole, r)
    (r / "checkpoint/step_000006.pt").rename(r / "checkpoint/new")  # killed while it was written
    with open(r / "samples.jsonl", "a") as f:
        f.write('{"ste')
    run, again = toy(r, r)
    assert checkpoints(r) == ["step_000004.pt", "step_000006.pt"]
    assert torch.equal(again, weights) and run.state["step"] == run.state["mine"] == 6
    for log in common.LOGS:
        assert (whole / log).read_text() == (r / log).read_text()
    assert [row["step"] for row in jsonl(r / "metrics.jsonl")] == [*range(7)]
    with pytest.raises(SystemExit) as stop:
        toy(whole)
    assert stop.value.code == 2 and "holds a run" in capsys.readouterr().err
    (tmp_path / "products").mkdir()
    (tmp_path / "products" / "golden.jsonl").write_text("{}")  # no run, but what a run may use
    toy(tmp_path / "products", steps=1)
