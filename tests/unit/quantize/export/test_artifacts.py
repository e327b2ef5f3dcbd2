from nemo_opt.quantize.export.artifacts import save_artifacts


def test_artifacts_are_the_tokenizers_files(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "tokenizer_config.json"):
        (source / name).write_text(name)
    assert save_artifacts(out) == []
    assert save_artifacts(out, tokenizer_dir=source) == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
