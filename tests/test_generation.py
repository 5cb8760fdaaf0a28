"""Generation: what beams find, that padding, batches and dropout do not show, grouping, files, errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hiddenkey_rs as hk
from families import build
from hiddenkey_rs import ConfigError, DataError
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import folder, generation, models, tasks
from hiddenkey_rs.experiments.generation import Decoding, Group, generate, generate_and_score, grouped
from hiddenkey_rs.experiments.run_config import RunConfig

E2E = tasks.TASKS["e2e"]
SOURCES = ["name : The Vaults | price : £ 30", "a", "name : Wildwood | area : riverside | food : French", "bc"]
SHORT = Decoding(beams=3, max_new_tokens=12, batch_size=4)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """(gpt2-tiny with weights large enough that it has opinions, its tokenizer)."""
    model, tokenizer = models.load_model("gpt2-tiny", E2E, 0)
    torch.manual_seed(0)
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.15)
    return model.eval(), tokenizer


class Scripted(torch.nn.Module):
    """Stands in for a model: notes what it is asked, answers with given tokens behind the prompt."""

    def __init__(self, answer: list[int], encoder_decoder: bool = False, positions: int = 64) -> None:
        super().__init__()
        self.answer, self.device = answer, torch.device("cpu")
        self.config = type("C", (), {"is_encoder_decoder": encoder_decoder, "max_position_embeddings": positions})()
        self.calls: list[dict[str, Any]] = []

    def generate(self, **asked: Any) -> torch.Tensor:
        self.calls.append({**asked, "training": self.training})
        rows = len(asked["input_ids"])
        answer = torch.tensor(self.answer).repeat(rows, 1)
        return answer if self.config.is_encoder_decoder else torch.cat([asked["input_ids"], answer], dim=1)


# -- searching ------------------------------------------------------------------------------------------------------


def test_one_beam_takes_the_likeliest_token(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    found = generate(model, tokenizer, SOURCES[:2], Decoding(beams=1, no_repeat=0, max_new_tokens=6))
    for source, text in zip(SOURCES, found, strict=False):
        ids = torch.tensor([tokenizer(source + "\n")["input_ids"]])
        start = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_a_models_own_generation_config_adds_no_rules(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    decoding = Decoding(beams=3, no_repeat=0, max_new_tokens=12)
    expected = generate(model, tokenizer, SOURCES, decoding)
    for name, value in {
        "no_repeat_ngram_size": 1,
        "early_stopping": True,
        "min_length": 60,
        "repetition_penalty": 3.0,
    }.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, SOURCES, decoding) == expected
    scripted = Scripted([65], encoder_decoder=True)
    generate(scripted, tokenizer, ["a"], decoding)
    asked = scripted.calls[0]["generation_config"].to_dict()
    assert (asked["encoder_no_repeat_ngram_size"], asked["encoder_repetition_penalty"]) == (0, 1.0)


def test_batches_and_padding_do_not_show(tiny: tuple[Any, Any]) -> None:
    together = generate(*tiny, SOURCES, SHORT)
    assert len(set(together)) > 1
    for size in (1, 2, 3):
        assert generate(*tiny, SOURCES, Decoding(beams=3, max_new_tokens=12, batch_size=size)) == together
    assert generate(*tiny, SOURCES[::-1], SHORT) == together[::-1]
    assert generate(*tiny, SOURCES, SHORT) == together


def test_padding_stands_on_the_left_and_is_masked() -> None:
    tokenizer = models.byte_tokenizer()
    tokenizer.padding_side = "right"  # however the tokenizer pads
    model = Scripted(tokenizer("yes")["input_ids"]).train()
    assert generate(model, tokenizer, ["abc", "d"], SHORT) == ["yes", "yes"]
    (call,) = model.calls
    pad = tokenizer.pad_token_id
    assert call["input_ids"].tolist() == [tokenizer("abc\n")["input_ids"], [pad, pad, *tokenizer("d\n")["input_ids"]]]
    assert call["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    config = call["generation_config"]
    assert (config.num_beams, config.length_penalty, config.max_new_tokens) == (3, 0.9, 12)
    assert (config.do_sample, config.eos_token_id, config.pad_token_id) == (False, tokenizer.eos_token_id, pad)
    assert not call["training"]
    assert model.training  # as it was


def test_texts_end_at_the_end_of_text() -> None:
    tokenizer = models.byte_tokenizer()
    answer = [*tokenizer(" yes\n")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert generate(Scripted(answer), tokenizer, ["a"], SHORT) == ["yes"]


def test_a_long_prompt_loses_its_beginning() -> None:
    tokenizer = models.byte_tokenizer()
    model = Scripted([65], positions=16)
    generate(model, tokenizer, ["abcdefgh"], SHORT)
    assert tokenizer.decode(model.calls[0]["input_ids"][0]) == "fgh\n"


def test_encoder_decoders_read_the_source_and_pad_on_the_right() -> None:
    tokenizer = models.byte_tokenizer()
    model = Scripted(tokenizer("ok")["input_ids"], encoder_decoder=True)
    assert generate(model, tokenizer, ["abc", "d"], SHORT) == ["ok", "ok"]
    assert model.calls[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("beams", [1, 4])
def test_no_run_of_tokens_comes_twice_but_the_prompts_may(
    tiny: tuple[Any, Any], beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    found: list[torch.Tensor] = []

    def noting(**asked: Any) -> torch.Tensor:
        found.append(real(**asked)[:, asked["input_ids"].shape[1] :])
        return found[-1]

    def repeats(ids: list[int]) -> bool:
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        pairs = list(itertools.pairwise(ids))
        return len(set(pairs)) < len(pairs)

    real = model.generate
    monkeypatch.setattr(model, "generate", noting)
    for size in (0, 2):
        generate(model, tokenizer, SOURCES, Decoding(beams=beams, no_repeat=size, max_new_tokens=40))
    free, bound = ([*map(repeats, texts.tolist())] for texts in found)
    assert any(free)  # else the next line shows nothing
    assert not any(bound)


def test_the_prompt_may_be_said_again() -> None:
    rule = generation._without_repetition(2, known=3)
    scores = torch.zeros(1, 9)
    ids = torch.tensor([[5, 6, 7, 5]])  # the prompt is 5 6 7: behind 5, 6 is free
    assert rule(ids, scores).tolist() == scores.tolist()
    assert rule(torch.tensor([[5, 6, 7, 5, 6, 5]]), scores)[0, 6] == float("-inf")


def test_dropout_of_an_attached_model_is_off(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    wanted = generate(model, tokenizer, SOURCES, SHORT)
    adapted = models.add_lora(models.load_model("gpt2-tiny", E2E, 0)[0], E2E, 4, 8, 0.5, None, 0)
    adapted.base_model.model.load_state_dict(
        {name.replace("c_attn.", "c_attn.base_layer."): value for name, value in model.state_dict().items()},
        strict=False,
    )
    handle = hk.attach(adapted, hk.HiddenKeyConfig.preset("hiddenkey", rate=0.5), stock_dropout="off")
    try:
        assert generate(adapted.train(), tokenizer, SOURCES, SHORT) == wanted
        assert adapted.training
    finally:
        handle.detach()


def test_other_families() -> None:
    for family in ("llama", "t5"):
        model = build(family)
        tokenizer = models.byte_tokenizer()
        model.resize_token_embeddings(len(tokenizer))
        found = generate(model, tokenizer, SOURCES[:2], Decoding(beams=2, max_new_tokens=4))
        assert len(found) == 2


# -- groups and files -----------------------------------------------------------------------------------------------

ROWS = [
    {"source": "a", "target": "A one.", "seen": True},
    {"source": "b", "target": "B.", "seen": False},
    {"source": "a", "target": "A two.", "seen": True},
    {"source": "b", "target": " ", "seen": False},
]


def test_rows_of_one_source_are_a_group() -> None:
    assert grouped(ROWS, E2E) == [Group("a", ("A one.", "A two."), "seen"), Group("b", ("B.",), "unseen")]
    assert grouped([{"source": "a", "target": "x"}], E2E) == [Group("a", ("x",), None)]
    with pytest.raises(DataError, match=r"a source has no reference \(got 'b'\); give it a text in 'target'"):
        grouped(ROWS[3:], E2E)
    with pytest.raises(ConfigError, match=r"language-modelling tasks \(got 'mrpc', classification\)"):
        grouped(ROWS, tasks.TASKS["mrpc"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "sizes"), [("E2E", {None: 630}), ("WebNLG", {"seen": 971, "unseen": 891})])
def test_groups_are_those_of_the_data(data_dir: Path, name: str, sizes: dict[str | None, int]) -> None:
    from hiddenkey_rs.experiments.data import read_rows

    found = grouped(read_rows(data_dir / name / "test.jsonl.gz"), E2E)
    wanted = read_rows(data_dir / name / "test_grouped.jsonl.gz")
    assert [(group.source, list(group.refs)) for group in found] == [(row["source"], row["refs"]) for row in wanted]
    parts = [group.part for group in found]
    assert {part: parts.count(part) for part in set(parts)} == sizes


def test_texts_are_written_and_scored(tmp_path: Path) -> None:
    tokenizer = models.byte_tokenizer()
    model = Scripted(tokenizer("A one.")["input_ids"])
    groups = grouped(ROWS, E2E)
    out = tmp_path / "texts.jsonl"
    found = generate_and_score(model, tokenizer, groups, E2E, SHORT, out, ["ter", "rouge_l"])
    assert json.loads(out.read_text().splitlines()[1]) == {
        "source": "b",
        "refs": ["B."],
        "part": "unseen",
        "hypothesis": "A one.",
    }
    assert generation.read_texts(out) == (groups, ["A one.", "A one."])
    assert found["scores"]["seen"] == {"ter": 0.0, "rouge_l": 100.0}
    assert found["scores"]["unseen"] == {"ter": 100.0, "rouge_l": 0.0}
    assert found["scores"]["all"] == {"ter": 40.0, "rouge_l": 50.0}
    assert (found["groups"], found["empty"], found["decoding"]["beams"]) == (2, 0, 3)
    assert found["absent"] == {}


def test_texts_with_any_line_ends_are_read_again(tmp_path: Path) -> None:
    groups = [Group("c\u2028d", ("C\x85.", "e\r"), None), Group("", ("f",), "seen")]
    generation.write_texts(tmp_path / "texts.jsonl", groups, ["a\u2029b", "\n"])
    assert generation.read_texts(tmp_path / "texts.jsonl") == (groups, ["a\u2029b", "\n"])


def test_the_papers_decoding() -> None:
    assert generation.decoding_for(E2E) == Decoding(10, 0.9, 4)
    assert generation.decoding_for(tasks.TASKS["webnlg"], beams=2) == Decoding(2, 0.8, 4)
    own = tasks.own_task("own", ("source", "target"), "lm", "", 0)
    assert generation.decoding_for(own) == Decoding(10, 0.9, 4)


def run_folder(tmp_path: Path) -> Path:
    for split, rows in (("train", ROWS[:3]), ("dev", ROWS[:1]), ("test", ROWS[:3])):
        path = tmp_path / "E2E" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    out.mkdir()
    config = RunConfig(model="gpt2-tiny", task="e2e", data=str(tmp_path), out=str(out))
    folder.write_json(out / folder.CONFIG, {"run": config.to_dict()})
    return out


def test_texts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder(tmp_path)
    with pytest.raises(ConfigError, match="the run has no adapter yet"):
        generation.generate_run(out)
    model = models.add_lora(models.load_model("gpt2-tiny", E2E, 0)[0], E2E, 2, 4, 0.0, None, 0)
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 2)
    model.save_pretrained(out / folder.ADAPTER)
    decoding = Decoding(beams=1, max_new_tokens=8)
    found = generation.generate_run(out, "test", ["ter"], limit=1, beams=1, max_new_tokens=8)
    assert (found["split"], found["groups"]) == ("test", 1)
    assert "1/1" in capsys.readouterr().err
    assert found["file"] == str(out / "generated-test-first-1.jsonl")
    groups, texts = generation.read_texts(out / "generated-test-first-1.jsonl")
    assert groups == [Group("a", ("A one.", "A two."), "seen")]
    assert texts == generate(model, models.byte_tokenizer(), ["a"], decoding)
    plain = models.load_model("gpt2-tiny", E2E, 0)[0]
    assert texts != generate(plain, models.byte_tokenizer(), ["a"], decoding)
    command = [
        "eval",
        "--run",
        str(out),
        "--generate",
        "test",
        "--beams",
        "1",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "1",
    ]
    assert main([*command, "--json", str(tmp_path / "nowhere" / "scores.json")]) == 2
    assert not (out / "generated-test.jsonl").exists(), "found out before the work"
    capsys.readouterr()
    assert main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    assert len(generation.read_texts(out / "generated-test.jsonl")[1]) == 2
    printed, scores = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert scores["decoding"]["beams"] == scores["decoding"]["batch_size"] == 1
    assert f"{scores['groups']} texts ({scores['empty']} empty)" in printed
    assert {"bleu", "nist"} <= scores["scores"]["all"].keys()
    assert main([*command, "--limit", "0"]) == 2
    assert main(["eval", "--run", str(out), "--generate", "test", "--beams", "0"]) == 2
    assert "beams must be a whole number from 1 up (got 0)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no such rows to generate for \(got split 'train'\)"):
        generation.generate_run(out, "train")


# -- errors ---------------------------------------------------------------------------------------------------------


def test_tokens_that_are_missing() -> None:
    for name, mend in (("pad", "tokenizer.pad_token = tokenizer.eos_token"), ("eos", "set tokenizer.eos_token")):
        tokenizer = models.byte_tokenizer()
        setattr(tokenizer, f"{name}_token", None)
        with pytest.raises(ConfigError, match=rf"generation needs a {name} token .*{mend}"):
            generate(Scripted([65]), tokenizer, ["a"], SHORT)


def test_no_room_for_a_prompt() -> None:
    with pytest.raises(ConfigError, match=r"no room .*\(got max_new_tokens 12, the model reads 12\)"):
        generate(Scripted([65], positions=12), models.byte_tokenizer(), ["a"], SHORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beams": 0}, r"beams must be a whole number from 1 up \(got 0\)"),
        ({"no_repeat": -1}, r"no_repeat must be a whole number from 0 up \(got -1\)"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens must be a whole number from 1 up \(got 1.5\)"),
        ({"batch_size": True}, r"batch_size must be a whole number from 1 up \(got True\)"),
        ({"length_penalty": float("nan")}, r"length_penalty must be a number \(got nan\)"),
    ],
)
def test_hostile_decodings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**changes)


def test_a_model_that_says_nothing(tmp_path: Path) -> None:
    tokenizer = models.byte_tokenizer()
    silent = Scripted([tokenizer.eos_token_id])
    with pytest.raises(DataError, match=r"all texts are empty \(got 2 of them\)"):
        generate_and_score(silent, tokenizer, grouped(ROWS, E2E), E2E, SHORT, tmp_path / "texts.jsonl")
    assert generation.read_texts(tmp_path / "texts.jsonl")[1] == ["", ""]  # what there was is kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_learns_is_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint's dtype is its model's: a new head in float16 would become NaN at the first step."""
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(vocab_size=300, pad_token_id=0, **shape)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    models.byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = models.load_model(str(tmp_path), tasks.TASKS["mrpc"], 0)
    assert model.config.pad_token_id == tokenizer.pad_token_id != 0
    model = models.add_lora(model, tasks.TASKS["mrpc"], 2, 4.0, 0.0, None, 0)
    learning = {value.dtype for value in model.parameters() if value.requires_grad}
    assert learning == {torch.float32}
    assert any("score" in name for name, value in model.named_parameters() if value.requires_grad)
