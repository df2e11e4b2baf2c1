"""common.py: sampling, log-probabilities, answers, data, the tiny model, checkpoints."""

import copy
import json
import math
import warnings
from types import SimpleNamespace

import make
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import common
from common import Problem, Sample, extract_answer, same_answer

CPU = SimpleNamespace(device="cpu", temperature=1.0, micro_tokens=4096)


def tiny_problems(levels, number, split="train"):
    return [Problem(**row) for row in make.sum_problems(levels, split, number)]


def prompts(tok, n, levels=(1, 2, 3)):
    problems = tiny_problems(levels, n)
    return [tuple(ids) for ids in common.encode_questions(tok, [p.question for p in problems])]


# ---------------------------------------------------------------------------- log-probabilities


def full_logps(model, samples, temperature):
    """The plain way: every logit, one row at a time, no padding."""
    out = []
    for s in samples:
        ids = torch.tensor([[*s.prompt, *s.tokens]])
        logp = (model(ids).logits.float() / temperature).log_softmax(-1)[0]
        at = range(len(s.prompt) - 1, ids.shape[1] - 1)
        rows = logp[list(at)]
        out.append((rows.gather(1, torch.tensor(s.tokens)[:, None])[:, 0],
                    -(rows.exp() * rows).sum(-1)))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("positions", [10**6, 4])  # per chunk of the LM head
def test_log_probs_and_entropy_equal_full_logits(tiny, temperature, positions, monkeypatch):
    model, tok = tiny
    monkeypatch.setattr(common, "HEAD_FLOATS", positions * model.config.vocab_size)
    samples = common.sample(model, tok, prompts(tok, 3), 2, 20, 1.0)
    ids, mask = common.collate(samples, "cpu")
    logp, entropy = common.response_logps(model, ids, mask, temperature, with_entropy=True)
    assert logp.shape == entropy.shape == mask.shape and not entropy.requires_grad
    assert (logp[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    for r, (want, want_entropy) in enumerate(full_logps(model, samples, temperature)):
        assert torch.allclose(logp[r, mask[r] > 0], want, atol=1e-5)
        assert torch.allclose(entropy[r, mask[r] > 0], want_entropy, atol=1e-5)
    grads = []
    for total in (logp.sum(), sum(w.sum() for w, _ in full_logps(model, samples, temperature))):
        model.zero_grad()
        total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    assert torch.allclose(grads[0], grads[1], atol=1e-5 * grads[1].abs().max())


@pytest.mark.parametrize("trained", [True, False])  # the head; LoRA leaves it frozen
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_head_in_chunks_is_the_head_at_once(tiny, monkeypatch, with_bias, trained):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    if with_bias:
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        head.weight.data, head.bias.data = model.lm_head.weight.data.clone(), torch.randn(
            model.config.vocab_size)
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(head)
    model.get_output_embeddings().requires_grad_(trained)
    model.generation_config.suppress_tokens = [tok.convert_tokens_to_ids("7")]
    samples = common.sample(model, tok, prompts(tok, 3), 2, 20, 1.0)
    ids, mask = common.collate(samples, "cpu")
    a, b = torch.randn(2, *mask.shape)
    found = []
    for positions in (10**6, 7):
        monkeypatch.setattr(common, "HEAD_FLOATS", positions * model.config.vocab_size)
        monkeypatch.setattr(common, "CACHE_FLOATS", 3 * model.config.vocab_size)
        logp, H = common.response_logps(model, ids, mask, .7, with_entropy=True, entropy_grad=True)
        model.zero_grad()
        (a * logp + b * H).sum().backward()
        assert (model.get_output_embeddings().weight.grad is not None) == trained
        found.append((logp, H, torch.cat([p.grad.flatten() for p in model.parameters()
                                          if p.requires_grad])))
    for x, y in zip(*found):
        assert torch.allclose(x, y, atol=1e-5 * x.abs().max().item())


def test_an_adapter_on_the_head_counts(tiny, monkeypatch):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        model = peft.get_peft_model(copy.deepcopy(tiny[0]), config)
    ids, mask = common.collate(common.sample(*tiny, prompts(tiny[1], 3), 2, 20, 1.0), "cpu")
    want = common.response_logps(model, ids, mask, 1.0)[0]
    monkeypatch.setattr(common, "HEAD_FLOATS", 2000)
    assert torch.allclose(common.response_logps(model, ids, mask, 1.0)[0], want, atol=1e-5)
    assert not torch.allclose(common.response_logps(tiny[0], ids, mask, 1.0)[0], want, atol=1e-2)


def test_a_head_in_chunks_keeps_no_logits(tiny, monkeypatch):
    model, tok = tiny
    V = model.config.vocab_size
    monkeypatch.setattr(common, "HEAD_FLOATS", 4 * V)
    ids, mask = common.collate(common.sample(model, tok, prompts(tok, 4), 2, 20, 1.0), "cpu")
    hidden, saved = common.hidden_states(model, ids).detach().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.shape) or x, lambda x: x):
        logp, _ = common.response_logps(model, ids, mask, 1.0, with_entropy=True, hidden=hidden)
    assert saved and not [s for s in saved if len(s) > 1 and s[-1] == V]
    logp.sum().backward()
    model.zero_grad()


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(tiny, monkeypatch):
    """1 + 2^-9 + 2^-9 + ... rounds to 1 at every addition in bfloat16."""
    monkeypatch.setattr(common, "HEAD_FLOATS", 2)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.tensor([[2.0]] + [[2.0**-8]] * 128, dtype=torch.bfloat16)
    target = torch.zeros(len(hidden), dtype=torch.long)
    logp, _ = common.ChunkedHead.apply(hidden, weight, target, tiny[0], 1.0, False, False)
    logp.sum().backward()
    assert weight.grad[:, 0].tolist() == [1.25, -1.25]  # (1 - p) hidden, p = 1/2


def test_sampler_and_trainer_log_probs_agree(tiny):
    model, tok = tiny
    samples = common.sample(model, tok, prompts(tok, 4), 3, 30, 0.9)
    assert len({len(s.prompt) for s in samples}) > 1, "left padding is not exercised"
    ids, mask = common.collate(samples, "cpu")
    logp, entropy = common.response_logps(model, ids, mask, 0.9, with_entropy=True)
    for r, s in enumerate(samples):
        assert logp[r, mask[r] > 0].tolist() == pytest.approx(s.logps, abs=2e-5)
        assert entropy[r].sum().item() == pytest.approx(s.entropy, abs=1e-3)


def test_batch_log_probs_do_not_depend_on_micro_batches(tiny):
    model, tok = tiny
    samples = common.sample(model, tok, prompts(tok, 4), 2, 20, 1.0)
    parts = [common.batch_logps(model, samples, SimpleNamespace(
        device="cpu", temperature=1.0, micro_tokens=n)) for n in (1, 150, 10**6)]
    assert torch.allclose(parts[0], parts[2], atol=1e-5)
    assert torch.allclose(parts[1], parts[2], atol=1e-5)


def test_micro_batches_hold_every_row_once_within_the_budget():
    samples = [Sample((1,) * (1 + i % 5), [2] * (1 + i * 7 % 11), "", True) for i in range(40)]
    batches = list(common.micro_batches(samples, 60))
    assert sorted(i for b in batches for i in b) == list(range(40))
    for b in batches:
        longest = max(len(samples[i].prompt) + len(samples[i].tokens) for i in b)
        assert len(b) == 1 or len(b) * longest <= 60
    assert list(common.micro_batches(samples[:3], 1)) == [[0], [2], [1]]  # by length
    assert list(common.micro_batches([], 60)) == []


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
        eos_token_id=common.stop_ids(model, tok)))[:, width:]
    for s, row in zip(ours, out.tolist()):
        assert row[:len(s.tokens)] == s.tokens
        assert s.finished == (s.tokens[-1] == tok.eos_token_id)
        assert set(row[len(s.tokens):]) <= {tok.pad_token_id}


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


def test_drawing_in_pieces_is_drawing_at_once(monkeypatch):
    logits, found = torch.randn(9, 50), []
    for floats in (10**6, 100, 1):  # 9 rows, 2, 1 at a time
        monkeypatch.setattr(common, "CACHE_FLOATS", floats)
        found.append(common.draw(logits, 0.8, torch.Generator().manual_seed(0)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("read", [None, 5])
def test_decoding_with_a_static_cache_is_decoding(tiny, monkeypatch, read):
    """What a CUDA graph replays, without the graph: every token, log-probability and entropy."""
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    asked = [*prompts(tok, 5), (3,)]
    found = []
    for devices in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(common, "GRAPHED", devices)
        model.generation_config.suppress_tokens = None
        found.append(common.sample(model, tok, asked, 3, 40, 0, None, read))
        model.generation_config.suppress_tokens = [tok.eos_token_id]  # past the first room
        found[-1] += common.sample(model, tok, asked[:2], 1, 300, 0, None, read)
        model.generation_config.suppress_tokens = None
        single = common.sample(model, tok, asked, 3, 1, 0, None, read)
        model.generation_config.eos_token_id = single[-1].tokens  # the last prompt ends, at once
        found[-1] += common.sample(model, tok, asked, 3, 1, 0, None, read)
        assert sum(s.finished for s in found[-1][-len(single):]) == 3
        model.generation_config.eos_token_id = None
    lengths = {len(s.tokens) for s in found[0]}
    assert len(lengths) > 4 and {1, 300} <= lengths
    for a, b in zip(*found):
        assert a.tokens == b.tokens and a.finished == b.finished and len(a.read) == len(b.read)
        assert (*a.logps, a.entropy, *a.read) == pytest.approx((*b.logps, b.entropy, *b.read),
                                                               abs=2e-4, rel=1e-5)


def test_a_static_cache_makes_room_and_follows_the_rows(tiny, monkeypatch):
    model, tok = tiny
    monkeypatch.setattr(common, "GRAPHED", ("cpu",))
    rooms = []
    make_room = common.GraphedForward.make_room
    monkeypatch.setattr(common.GraphedForward, "make_room", lambda self, *a: (
        make_room(self, *a), rooms.append((len(self.token), self.room)))[0])
    torch.manual_seed(0)
    common.sample(model, tok, prompts(tok, 8), 4, 280, 3.0)
    rows, room = zip(*rooms)
    assert rows[0] == 32 and all(a >= b for a, b in zip(rows, rows[1:]))
    assert len(set(rows)) > 1, "no row was dropped"
    assert all(b <= a / 2 for a, b in zip(rows, rows[1:]) if a != b)
    assert room[0] == 256 and max(room) <= 280 + 64


def test_a_sliding_window_is_decoded_by_transformers_rules(monkeypatch):
    monkeypatch.setattr(common, "GRAPHED", ("cpu",))
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, sliding_window=6)).eval()
    for p in model.parameters():
        p.data *= 4
    model.generation_config.eos_token_id = None
    tok = SimpleNamespace(eos_token_id=49, pad_token_id=0,
                          batch_decode=lambda rows, **_: [""] * len(rows))
    found = common.sample(model, tok, [(5, 6, 7), (8, 9)], 1, 20, 0)
    assert len({t for s in found for t in s.tokens}) > 5
    for s in found:
        logits = model(torch.tensor([[*s.prompt, *s.tokens]])).logits[0]
        assert logits[len(s.prompt) - 1:-1].argmax(-1).tolist() == s.tokens


def test_whole_responses_follow_the_policy(tiny):
    """First tokens of the loop against exact probabilities."""
    model, tok = tiny
    torch.manual_seed(0)
    asked = prompts(tok, 2)
    n = 2000
    found = common.sample(model, tok, asked, n, 3, 1.5)
    for i, p in enumerate(asked):
        exact = (model(torch.tensor([p])).logits[0, -1] / 1.5).softmax(-1)
        first = torch.bincount(torch.tensor([s.tokens[0] for s in found[i * n:(i + 1) * n]]),
                               minlength=len(exact))
        likely = exact > .01
        chi2 = ((first - n * exact)[likely] ** 2 / (n * exact[likely])).sum().item()
        assert chi2 < int(likely.sum()) + 5 * math.sqrt(2 * int(likely.sum()))


def test_groups_stay_in_prompt_order_whatever_the_chunks(tiny):
    model, tok = tiny
    asked = prompts(tok, 7, (3, 1, 2))
    for rows in (2, 5, 256):
        found = common.sample(model, tok, asked, 2, 6, 1.0, rows=rows)
        assert [s.prompt for s in found] == [p for p in asked for _ in range(2)]
        assert all(1 <= len(s.tokens) <= 6 and len(s.logps) == len(s.tokens) for s in found)
        assert all(s.finished or len(s.tokens) == 6 for s in found)


def test_sampling_does_not_depend_on_hub_generation_defaults(tiny, monkeypatch):
    model, tok = tiny
    monkeypatch.setattr(model, "generation_config", GenerationConfig(
        repetition_penalty=5.0, top_k=1, temperature=.01, eos_token_id=tok.eos_token_id))
    texts = {s.text for s in common.sample(model, tok, prompts(tok, 1), 32, 8, 4.0)}
    assert len(texts) > 5


# ------------------------------------------------------------------- tokenizers and checkpoints


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
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
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


UGLY = "12-5=7\n#### 24  two  spaces\ttab caf\u00e9 \u4f60\u597d (x_1)^2 <|user|> \u20ac1,000.50"


def test_tiny_tokenizer_survives_save_and_load(tiny, tmp_path):
    model, tok = tiny
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for p in [UGLY, *(x for q in tiny_problems((1, 5), 20, "test")
                      for x in (q.question, q.solution))]:
        ids = tok(p, add_special_tokens=False).input_ids
        assert again(p, add_special_tokens=False).input_ids == ids
        assert tok.decode(ids) == again.decode(ids) == p
    assert again.chat_template == tok.chat_template
    assert (again.eos_token_id, again.pad_token_id) == (tok.eos_token_id, tok.pad_token_id)
    assert tok.eos_token_id != tok.pad_token_id
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tok("12-5=").input_ids])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_prompts_and_continuations(tiny):
    _, tok = tiny
    asked, = common.encode_questions(tok, ["How many?"])
    assert tok.decode(asked) == "<|user|>How many?<|assistant|>"
    s, = common.as_samples(tok, [asked], ["1+1=2\n#### 2"])
    assert s.tokens[-1] == tok.eos_token_id and s.tokens.count(tok.eos_token_id) == 1
    assert s.prompt == tuple(asked) and s.text == "1+1=2\n#### 2" and s.finished


@pytest.mark.parametrize("bos,template,text", [
    (False, False, "How many?\n"), (True, False, "<s>How many?\n"),
    (False, True, "<s>[user] How many? [assistant] "),
    (True, True, "<s>[user] How many? [assistant] ")])
def test_bos_comes_once(bos, template, text):
    tok = word_tokenizer(bos=bos, template=template)
    assert tok.decode(common.encode_questions(tok, ["How many?"])[0]) == text
    golden, = common.as_samples(tok, [(0, 5)], ["2"])
    assert golden.tokens == [*tok("2", add_special_tokens=False).input_ids, tok.eos_token_id]


def test_prompts_never_end_in_eos():
    tok = word_tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert tok.decode(tok("x").input_ids) == "<s>x</s>"
    assert tok.decode(common.encode_questions(tok, ["How many?"])[0]) == "<s>How many?\n"


def test_stop_ids_hold_every_eos(tiny, monkeypatch):
    model, tok = tiny
    monkeypatch.setattr(model.generation_config, "eos_token_id", [3, 5])
    assert common.stop_ids(model, tok) == sorted({3, 5, tok.eos_token_id})


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


def test_logit_processing_after_the_head_is_refused(tmp_path, capsys):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    Gemma2ForCausalLM(Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=.1, pad_token_id=2,
        initializer_range=1.0)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_model(str(tmp_path), CPU)
    assert "soft-capping" in capsys.readouterr().err


@pytest.mark.parametrize("name,hub_id", [
    ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"), ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ("Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
    ("CodeLlama-7b-hf", "codellama/CodeLlama-7b-hf"),
    ("DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
    ("OctoThinker-3B-Long-Base", "OctoThinker/OctoThinker-3B-Long-Base"), ("a/b", "a/b")])
def test_bare_names(name, hub_id):
    assert common.resolve_model(name, CPU) == hub_id


def test_a_small_policy_takes_one_thread(tiny_folder, llama_folder):
    try:
        for path, flag, threads in ((tiny_folder, "--judge", 2), (tiny_folder, "--model", 1)):
            torch.set_num_threads(2)
            common.load_model(path, CPU, flag=flag)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_a_model_may_say_what_it_was_trained_with(tiny):
    model = copy.deepcopy(tiny[0])
    assert common.trained_prompt(model, "instruction") == ""
    assert common.trained_prompt(model, "judge") is None
    for prompts in (None, "x", {"instruction": 1}, {}):
        model.config.prompts = prompts
        assert common.trained_prompt(model, "instruction") is None
    del model.config.prompts
    assert common.trained_prompt(model, "instruction") is None


def test_lora_reference_is_the_untrained_model(llama_folder):
    model, tok = common.load_model(llama_folder(), CPU, lora=True)
    names = [n for n, _ in common.trained(model)]
    assert names and all("lora" in n for n in names)
    assert common.causal_lm(model).is_activation_checkpointing and model.training
    ids, mask = common.collate(common.as_samples(tok, [(5, 6)], ["####"]), "cpu")
    before = common.response_logps(model, ids, mask, 1.0)[0].detach()
    opt = common.MasterAdamW(model, lr=1e-2)
    cfg = SimpleNamespace(max_grad_norm=1.0, lr=1e-2, warmup_steps=0)
    for step in (1, 2):  # B starts at zero, so A moves from the second step on
        loss = -common.response_logps(model, ids, mask, 1.0)[0].sum()
        loss.backward()
        common.update(opt, cfg, step, loss.item())
    after = common.response_logps(model, ids, mask, 1.0)[0].detach()
    reference = common.reference_logps(model, common.frozen_reference(model), ids, mask, 1.0)
    assert torch.allclose(reference, before, atol=1e-6)
    assert (after - before).abs().max() > 1e-3
    assert len(common.sample(model, tok, [(5, 6)], 2, 4, 1.0)) == 2 and model.training


def test_frozen_reference_does_not_follow_the_policy(policy):
    reference = common.frozen_reference(policy)
    ids, mask = common.collate([Sample((5, 6), [7, 8], "", True)], "cpu")
    before = common.reference_logps(policy, reference, ids, mask, 1.0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(.1)
    assert torch.equal(common.reference_logps(policy, reference, ids, mask, 1.0), before)
    assert not torch.allclose(common.response_logps(policy, ids, mask, 1.0)[0], before)


def test_bfloat16_weights_learn_at_small_rates():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    start, opt = model.weight.detach().clone(), common.MasterAdamW(model, lr=1e-5)
    plain = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain_opt = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0)
    for _ in range(200):
        for m, o in ((model, opt), (plain, plain_opt)):
            m.zero_grad()
            m(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum().backward()
            o.step()
    moved = (start - model.weight).float().mean().item()
    assert moved == pytest.approx(2e-3, rel=.2)  # 200 steps of 1e-5
    assert (start - plain.weight).float().mean().item() < moved / 2, "bfloat16 rounds steps away"


def test_optimizer_in_host_memory_takes_the_same_steps(monkeypatch):
    torch.manual_seed(0)
    data, found = torch.randn(2, 3, 8, dtype=torch.bfloat16), []
    cfg = SimpleNamespace(max_grad_norm=.1, lr=1e-2, warmup_steps=0)
    for far in (False, True):
        monkeypatch.setattr(common, "too_large_for_gpu", lambda weights, far=far: far)
        torch.manual_seed(1)
        model, head = torch.nn.Linear(8, 8, dtype=torch.bfloat16), torch.nn.Linear(8, 1)
        opt, norms = common.MasterAdamW(model, head, lr=1e-2), []
        for micro_batches in data:  # two steps of three micro-batches
            for x in micro_batches:
                head(model(x).float()).square().sum().backward()
                assert model.weight.grad is None
                assert far == (opt.masters[0].grad is None) == (len(opt.sums) == 2)
            norms.append(common.update(opt, cfg, 1, 0.))
            assert not opt.sums and opt.masters[0].grad is None
        found.append((norms, [p.detach() for p in (*opt.masters, *model.parameters())]))
    assert found[0][0] == found[1][0] and min(found[0][0]) > .1
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_small_gpus_leave_the_optimizer_to_the_host(monkeypatch):
    def weights(n, dtype=torch.bfloat16, device="cuda"):
        return [SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: n)]

    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=24 * 2**30))
    assert common.too_large_for_gpu(weights(1_543_714_304)), "Qwen2.5-1.5B"
    assert not common.too_large_for_gpu(weights(494_032_768)), "Qwen2.5-0.5B"
    assert not common.too_large_for_gpu(weights(10**10, torch.float32)), "adapters have no copies"
    assert not common.too_large_for_gpu(weights(10**10, device="cpu"))


def test_update_warms_up_clips_and_refuses_nan(capsys):
    w = torch.nn.Linear(1, 1, bias=False)
    opt = common.MasterAdamW(w, lr=1.0)
    cfg = SimpleNamespace(max_grad_norm=1.0, lr=.8, warmup_steps=4)
    for step, lr in ((1, .2), (2, .4), (4, .8), (9, .8)):
        w.weight.grad = torch.full((1, 1), 7.0)
        assert common.update(opt, cfg, step, 0.0) == pytest.approx(7)
        assert opt.param_groups[0]["lr"] == pytest.approx(lr) and w.weight.grad is None
        if step == 1:  # AdamW's first moment holds a tenth of the gradient: 1, not 7
            assert opt.state[w.weight]["exp_avg"].item() == pytest.approx(.1)
    kept = w.weight.detach().clone()
    for loss, grad in ((float("nan"), 1.0), (0.0, float("nan")), (float("inf"), 1.0)):
        w.weight.grad = torch.full((1, 1), grad)
        with pytest.raises(SystemExit) as stop:
            common.update(opt, cfg, 3, loss)
        assert stop.value.code == 2 and "step 3" in capsys.readouterr().err
    assert torch.equal(w.weight, kept)


def test_folders_are_whole_or_absent(tmp_path):
    target = tmp_path / "checkpoint"
    common.save_folder(target, lambda to: (to / "a").write_text("1"))

    def broken(to):
        (to / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError):
        common.save_folder(target, broken)
    assert (target / "a").read_text() == "1"
    common.save_folder(target, lambda to: (to / "b").write_text("3"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_special_tokens_in_a_text_are_defused(tiny):
    tok = tiny[1]
    special = set(tok.all_special_ids)
    for text in ("<|end|>", "a<|end|>b", "<|en<|end|>d|>", "<<|user|><|assistant|>|user|>"):
        assert not special & set(tok(common.defuse(tok, text), add_special_tokens=False).input_ids)
        turn, harmless = common.encode_questions(tok, [text, "x"])
        assert [i for i in turn if i in special] == [i for i in harmless if i in special]
        sample, = common.as_samples(tok, [[1]], [text])
        assert [i for i in sample.tokens if i in special] == [tok.eos_token_id]
    assert common.defuse(tok, "1 < 2, <b> |end|") == "1 < 2, <b> |end|"


@pytest.mark.parametrize("template, turns", [
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "[system]S[user]Q"),
    ("{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}",
     "[user]S\n\nQ"),  # leaves it out
    ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
     "[user]{{ m.content }}{% endfor %}", "[user]S\n\nQ"), (None, "S\n\nQ\n")])
def test_system_turns(tiny, template, turns, monkeypatch):
    tok = tiny[1]
    monkeypatch.setattr(tok, "chat_template", template)
    assert tok.decode(common.encode_questions(tok, ["Q"], "S")[0]) == turns


# ------------------------------------------------------------------------------ answer checking


@pytest.mark.parametrize("text,answer", [
    ("1+1=2\n#### 2", "2"), ("#### 1,080\n", "1,080"), ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("The answer is 5.", "5"), ("So, the answer is <203>.", "203"), ("Answer: 3.5 m", "3.5 m"),
    ("#### 3\nno: #### 4", "4"), ("\\boxed{1} then #### 2", "2"), ("#### 2 then \\boxed{1}", "1"),
    ("The final answer is: \\boxed{7}", "7"), ("the answer is $18", "$18"), ("just 7", None),
    ("", None), ("####", None), ("####   ", None), ("\\boxed{unclosed", None),
    ("\\boxed {a{b}c}", "a{b}c"), ("**Answer:** 12", "12"), ("Answer: x = 3. Done.", "x = 3")])
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
    ("5 m", "5", True), ("$18", "18.0", True), ("10^{10^{10}}", "7", False),
    ("9" * 5000, "9", False), ("\\" * 3000, "9", False)])
def test_same_answer(given, truth, equal):
    assert same_answer(given, truth) is equal


# ------------------------------------------------------------------------ evaluation and voting


def test_majority():
    assert common.majority(["1", "2", "2.0", None]) == 1
    assert common.majority(["1", "2"]) == 0
    assert common.majority([None, None, "3"]) == 2
    assert common.majority([None, None]) == 0


def test_evaluation_numbers(tiny, monkeypatch):
    model, tok = tiny
    problems = [Problem("a", "1", level="1"), Problem("b", "2", level="2")]
    # greedy: right, wrong. 4 samples: a right, wrong, right, right; b 5, 5, right, none
    script = iter([["#### 1", "#### 9"], ["#### 1", "#### 3", "#### 1.0", "#### 1",
                                          "#### 5", "#### 5", "#### 2", "none"]])
    monkeypatch.setattr(common, "sample", lambda *a, **k: [
        Sample((), [1], t, True) for t in next(script)])
    cfg = SimpleNamespace(max_new_tokens=8, eval_samples=4, temperature=1.0, device="cpu")
    result = common.evaluate(model, tok, problems, cfg,
                             lambda text, p: same_answer(extract_answer(text), p.answer))
    assert result == {"accuracy": .5, "accuracy/level1": 1, "accuracy/level2": 0, "mean@4": .5,
                      "pass@4": 1, "maj@4": .5}


def test_evaluation_leaves_the_training_generator_alone(tiny):
    model, tok = tiny
    problems = tiny_problems((1,), 4, "test")
    problems = common.encode_prompts(problems, model, tok, "", 8, "test")
    cfg = SimpleNamespace(max_new_tokens=8, eval_samples=3, temperature=1.0, device="cpu")
    before = torch.get_rng_state()
    first = common.evaluate(model, tok, problems, cfg, lambda t, p: p.answer in t)
    assert torch.equal(torch.get_rng_state(), before)
    assert common.evaluate(model, tok, problems, cfg, lambda t, p: p.answer in t) == first


# ----------------------------------------------------------------------------------------- data


def test_problem_stream_is_a_function_of_its_position():
    problems = list(range(7))
    stream = common.problem_stream(problems, 0, 3)
    first = [next(stream) for _ in range(30)]
    assert sorted(first[:7]) == problems and sorted(first[7:14]) == problems
    assert first[:7] != first[7:14]
    later = common.problem_stream(problems, 11, 3)
    assert [next(later) for _ in range(19)] == first[11:]
    other = common.problem_stream(problems, 0, 4)
    assert [next(other) for _ in range(14)] != first[:14]


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


def load(path):
    return common.to_problems(common.read_rows(path, "train", "--dataset"), path)


def test_gsm8k_rows(tmp_path):
    p = load(write(tmp_path / "a.jsonl", GSM))[3]
    assert p.answer == "5" and p.solution == "She has 3+2=5 figs.\n#### 5"


@pytest.mark.parametrize("row,problem", [
    ({"problem": "q", "answer": 70, "id": "0"}, ("q", "70", "")),
    ({"question": "q", "answer_cot": "the answer is <4>.", "answer_value": "4.0"},
     ("q", "4.0", "the answer is <4>.")),
    ({"problem": "q", "solution": "so $\\boxed{3}$", "level": 2}, ("q", "3", "so $\\boxed{3}$")),
    ({"ID": "1", "Body": "Ann has 2.", "Question": "How many?", "Answer": "2", "Equation": "2"},
     ("Ann has 2. How many?", "2", "")),
    ({"Body": "b", "Question": "x", "question_concat": "b x", "Answer": "2"}, ("b x", "2", "")),
    ({"prompt": "q", "final_answer": "x"}, ("q", "x", ""))])
def test_columns_are_recognised(tmp_path, row, problem):
    p, = load(write(tmp_path / "a.jsonl", [row]))
    assert (p.question, p.answer, p.solution) == problem


def test_json_array_and_parquet(tmp_path):
    from datasets import Dataset

    (tmp_path / "a.json").write_text(json.dumps(GSM, indent=1))
    Dataset.from_list(GSM).to_parquet(tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.json")) == load(str(tmp_path / "a.parquet")) \
        == load(write(tmp_path / "a.jsonl", GSM))


def test_held_out_rows_are_never_trained_on(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", GSM)
    cfg = SimpleNamespace(dataset=path, eval_dataset="", eval_size=0)
    train, held_out = common.load_problems(cfg)
    assert len(held_out) == 2 and len(train) == 10
    cfg.eval_dataset = write(tmp_path / "b.jsonl", GSM[:4])
    train, held_out = common.load_problems(cfg)
    assert len(held_out) == 4 and len(train) == 8
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert "4 training rows left out" in capsys.readouterr().out
    cfg.eval_size = 3
    assert len(common.load_problems(cfg)[1]) == 3


def test_instructions_ask_for_the_format_of_the_golden_answers(tiny, llama_folder):
    model, tok = common.load_model(llama_folder(), CPU)
    for name, solution, mark in (("x.jsonl", "#### 2", "####"), ("x.jsonl", "\\boxed{2}", "boxed"),
                                 ("gsm8k", "#### 2", "####"), ("math500", "", "boxed")):
        problems = [Problem("Q?", "2", solution)]
        instruction = common.instruction_for(problems, name, model)
        p, = common.encode_prompts(problems, model, tok, instruction, 8, "test")
        text = tok.decode(p.prompt)
        assert text.startswith("Q?\n") and mark in text
    assert common.instruction_for([Problem("Q?", "2")], "gsm8k", tiny[0]) == ""


def test_hub_ids_configs_and_test_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        parts = {"openai/gsm8k": ("train", "test"), "HuggingFaceH4/MATH-500": ("test",),
                 "a/b": ("train", "test"), "a/c": ("train",)}[name]
        return {s: [{"question": f"{s} {i}", "answer": str(i)} for i in range(20)] for s in parts}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, held_out in (("gsm8k", "test"), ("openai/gsm8k", "test"), ("math500", None),
                           ("a/b", "test"), ("a/c", None)):
        cfg = SimpleNamespace(dataset=name, eval_dataset="", eval_size=0)
        train, test = common.load_problems(cfg)
        assert len(train) + len(test) == (40 if held_out else 20)
        assert all(p.question.startswith(held_out or "t") for p in test)
    assert asked[0] == asked[2] == ("openai/gsm8k", "main")


def test_bfloat16_gradients_are_summed_in_float32():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    opt, x = common.MasterAdamW(model, lr=1e-3), torch.randn(300, 4, dtype=torch.bfloat16)
    for row in x:
        model(row).sum().backward()
    assert model.weight.grad is None
    assert torch.allclose(opt.masters[0].grad, x.float().sum(0).expand(4, 4), rtol=1e-5, atol=1e-5)
    opt.step()
    assert opt.masters[0].grad is None and torch.equal(model.weight, opt.masters[0].bfloat16())
