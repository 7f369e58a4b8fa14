"""Where a report may be written, and what stands in it."""

import json
import re
from pathlib import Path

from hf_quant.publish.charts import layers, places_of
from hf_quant.publish.page import MARK, html_page, why_not
from hf_quant.publish.page_model import Sample


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    assert why_not(tmp_path / "new.html") is None
    (tmp_path / "ours.html").write_text(f'<meta name="generator" content="{MARK}">')
    (tmp_path / "theirs.html").write_text('<meta name="generator" content="another program">')
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    assert why_not(tmp_path / "ours.html") is None
    for taken in (tmp_path / "theirs.html", tmp_path, tmp_path / "dangling.html"):
        assert "is there already" in (why_not(taken) or "")


def facts(folder: Path, scheme: str, kl: float) -> Path:
    """Records of a measured model, with names that would be code in a careless page."""
    folder.mkdir()
    layer = "model.layers.0.mlp.up_proj</script><b>"
    metric = {"value": kl, "low": kl / 2, "high": 2 * kl, "noise": 0.001, "within_noise": False}
    quality = {
        "kind": "causal", "tokens": 900, "documents": 9, "resampled": "documents", "context": 64, "stride": 64,
        "text_sha256": "0" * 64, "dtype": "bfloat16", "base_dtype": "float32", "metrics": dict.fromkeys(("kl", "perplexity", "base_perplexity", "perplexity_ratio", "top1"), metric),
        "quantiles": {"kl_p50": kl}, "kl_error": 0.0,
    }  # fmt: skip
    speed = {"batch": 1, "prompt": 8, "new": 3, "prefill": 90.0, "decode": 9.0, "first_token": 0.1,
             "prefill_spread": 0.1, "decode_spread": 0.1, "cache_bytes": 9}  # fmt: skip
    rung = {"name": scheme, "bytes": 10, "bits_per_weight": 4.1, "speed": speed, "quality": quality, "misses": [],
            "scheme": scheme, "overrides": {}}  # fmt: skip
    ladder = {"rungs": [rung | {"name": "base", "quality": None}, rung], "chosen": scheme, "chosen_bytes": 10,
              "limits": {"max_kl": 0.1}, "sensitivity": {"bits": [8, 4], "kl": {layer: [0.1, 0.2]}}}  # fmt: skip
    layers = [{"layer": layer, "scheme": scheme, "error": 0.1, "sqnr_db": 20.0, "of": "weights"}]
    recipe = {
        "scheme": scheme, "method": "rtn", "format": "native", "format_reason": "x", "dtype": "bfloat16",
        "share_quantized": 0.9, "bits_per_weight": 4.1, "schemes": {layer: scheme}, "left": {}, "regrouped": {},
        "asked": {"overrides": {}, "modules_to_not_convert": [], "quantize_lm_head": False, "quantize_embeddings": False},
        "calibration": None, "blocks": [], "versions": {"hf-quant": "0.1.0"},
        "source": {"model": "owner/llama", "revision": "0" * 40},
    }  # fmt: skip
    for name, record in (("results", {"quality": quality, "layers": layers}), ("ladder", ladder), ("recipe", recipe)):
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_a_page_of_two_models(tmp_path: Path) -> None:
    one, two = facts(tmp_path / "one", "W4A16-g128", 0.01), facts(tmp_path / "two", "W8A16-g128", 0.002)
    sample = Sample("Say <it>", ["a", " b", " c"], ["a", " x"])
    page = html_page(one, two, [sample])
    assert "<title>llama, W4A16-g128 and llama, W8A16-g128</title>" in page
    assert '<a href="https://huggingface.co/owner/llama">' in page and "hf-quant quantize owner/llama" in page
    assert page.count("</script>") == 2 and "up_proj</script>" not in page and "Say &lt;it&gt;" in page
    assert sample.same == 1 and "a<mark> b</mark>" in page and "a<mark> x</mark>" in page
    assert "<td>0.01<small>0.005 to 0.02</small></td><td>0.002<small>0.001 to 0.004</small></td>" in page
    places = re.findall(r'data-chart="([^"]+)"', page)
    charts = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["charts"]  # type: ignore[index]
    assert (
        set(places)
        == set(charts)
        == {f"{model}-{chart}" for model in (0, 1) for chart in ("ladder", "sensitivity-8", "sensitivity-4", "layers")}
    )
    assert "<h1>llama, W4A16-g128</h1>" in html_page(one) and not re.search(r"src=|@import|url\(", page), (
        "it loads nothing"
    )


def test_every_layer_has_a_place_of_its_own_in_the_chart() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj.weight", "lm_head"]
    assert list(places_of(names).values()) == [(0, "q_proj"), (1, "down_proj"), (-1, "lm_head")]
    names = [
        f"resnet.encoder.stages.{i}.layers.{j}.layer.{k}.convolution"
        for i in range(2)
        for j in range(2)
        for k in range(3)
    ]
    assert len(set(places_of(names).values())) == len(names)
    errors = [{"layer": name, "error": 0.1, "scheme": "W4A16-g32"} for name in names]
    assert layers(errors, dark=False).startswith(b"\x89PNG")
