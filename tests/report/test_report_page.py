"""The page of runs: what it holds, what it refuses, and that training keeps it."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import write_run
from tiny_run import tiny_config

from gdd_fast.distill.run import distill
from gdd_fast.errors import DataError
from gdd_fast.models.files.load import load_generator
from gdd_fast.report import report_page, run_charts
from gdd_fast.report.__main__ import main
from gdd_fast.report.report_page import MAX_SHEETS, page
from gdd_fast.report.run_record import read_run
from gdd_fast.sampling.generate import SamplerConfig, generate
from gdd_fast.sampling.grid import save_grid


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_every_number_of_every_tick_is_in_a_chart(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    data = data_of(page([run]))
    columns = data["runs"][0]["columns"]
    assert set(run.lines[1]) <= set(columns), "whatever a line holds"
    drawn = {name for chart in data["charts"] for name in chart["columns"]}
    assert drawn | {"images", "minutes"} == set(columns)
    assert columns["fid"] == [line.get("fid") for line in run.lines]
    assert columns["loss_g"][2] is None, "what was not finite is a gap, not a number"
    real, fake = columns["logit_real"][1], columns["logit_fake"][1]
    assert columns["logit_gap"][1] == pytest.approx(real - fake)
    sections = {name: chart["section"] for chart in data["charts"] for name in chart["columns"]}
    assert sections["fid"] == sections["recall"] == "quality" and sections["grad_norm_g"] == "training"


def test_sheets_are_the_runs_pictures_and_not_too_many(tmp_path):
    folder = write_run(tmp_path / "run", ticks=60)
    run = read_run(folder)
    sheets = data_of(page([run]))["runs"][0]["sheets"]
    assert len(sheets) == MAX_SHEETS
    assert (sheets[0]["images"], sheets[-1]["images"]) == (0, 60_000)
    for sheet in (sheets[0], sheets[-1]):
        data = base64.b64decode(sheet["source"].partition(",")[2])
        shown, kept = Image.open(io.BytesIO(data)), Image.open(folder / "samples" / f"{sheet['images']:09d}.png")
        assert np.array_equal(np.asarray(shown), np.asarray(kept.convert("RGB")))


def test_a_large_sheet_is_compressed(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 64, 64), np.uint8))
    save_grid(noise, tmp_path / "sheet.png")
    source = report_page._picture(tmp_path / "sheet.png")
    assert len(source) < (tmp_path / "sheet.png").stat().st_size


def test_the_page_fetches_nothing_and_no_name_breaks_out_of_it(tmp_path):
    html = page([read_run(write_run(tmp_path / "<b>run", data="</script><script>alert(1)</script>"))])
    assert "<b>run" not in html and "<script>alert" not in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert """http-equiv="Content-Security-Policy" content="default-src 'none';""" in html
    assert "&lt;b&gt;run" in html


def test_the_table_marks_the_better_run(tmp_path):
    runs = [read_run(write_run(tmp_path / "a", fid=3.0)), read_run(write_run(tmp_path / "b", fid=5.0, recall=0.7))]
    html = page(runs)
    row = {name: re.search(rf"<tr><th>{name}</th>(.*?)</tr>", html)[1] for name in ("fid, best", "recall, best")}
    assert re.match(r"<td class=best>3 at", row["fid, best"]), "lower is better"
    assert re.search(r"</td><td class=best>0.7 at", row["recall, best"]), "higher is better"
    assert "generator.g_lr" not in html and html.count("class=best") == 2


def test_a_deviation_stands_beside_its_metric(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for images, kid in ((5000, 0.0315), (6000, None)):
            file.write(json.dumps({"images": images, "kid": kid, "kid_std": 0.0025}) + "\n")
    run = read_run(folder)
    assert [c["title"] for c in run_charts.charts([run]) if c["section"] == "quality"] == ["fid", "recall", "kid"]
    assert run_charts.summary(run)["kid, best"] == ("0.0315 ± 0.0025 at 5,000", 0.0315)
    assert "<dd>0.0315<small> ± 0.0025 at 5,000</small></dd>" in page([run]), "a tile is too narrow for both"


def test_what_evaluate_at_start_measures_is_a_level_in_the_generators_charts(tmp_path):
    """Keys as training writes them, with the network behind; more of f1 is better."""
    folder = write_run(tmp_path / "run")
    first = {"kid-lite2-64": 8.0, "kid_std-lite2-64": 0.1, "f1-lite2-64": 0.0}
    later = {"kid-lite2-64": 0.5, "kid_std-lite2-64": 0.02, "f1-lite2-64": 0.6}
    teacher = {f"teacher_{key}": value / 2 for key, value in later.items()}
    lines = [{"images": 0, **first, **teacher}, {"images": 1000, **later}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    charts = {c["title"]: c["columns"] for c in run_charts.charts([run]) if c["section"] == "quality"}
    assert charts.keys() == {"kid-lite2-64", "f1-lite2-64"}
    assert charts["f1-lite2-64"] == {"f1-lite2-64": "f1-lite2-64", "teacher_f1-lite2-64": "teacher"}
    assert run_charts.columns(run)["teacher_f1-lite2-64"] == [0.3, 0.3]
    rows = run_charts.summary(run)
    assert rows["kid-lite2-64, best"][0] == "0.5 ± 0.02 at 1,000" and rows["f1-lite2-64, best"] == (
        "0.6 at 1,000",
        -0.6,
    )
    assert rows["f1-lite2-64, teacher"] == ("0.3", None)


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    for path in (run / "metrics.jsonl", run / "unet.json", *(run / "samples").iterdir()):
        path.unlink()
    html = page([read_run(run)])
    assert data_of(html)["charts"] == [] and "0 of 16,000" in html and 'id="samples"' not in html


def test_a_run_in_a_folder_whose_name_is_no_text_has_a_page(tmp_path):
    """Bytes that are not UTF-8, or any letter but ASCII's where the locale has no other."""
    folder = tmp_path / os.fsdecode(b"b\xfc")
    write_run(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "run_dir": str(folder)}))
    report_page.refresh(folder)
    assert r"b\udcfc" in (folder / "report.html").read_bytes().decode()


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / name / "run")) for name in ("a", "b")]
    assert [run["name"] for run in data_of(page(runs))["runs"]] == ["a/run", "b/run"]


def test_settings_that_differ_are_marked_and_changes_shown(tmp_path):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", g_lr=0.5)
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"images": 2000, "changed": ["generator.g_lr: 0.1 -> 0.5"]}) + "\n")
    html = page([read_run(one), read_run(other)])
    assert re.search(r'<tr class="differs"><th>g_lr</th><td>0.0001</td><td>0.5</td>', html)
    assert '<tr class="same"><th>d_lr</th>' in html
    assert "from 2,000 images on: generator.g_lr: 0.1 -&gt; 0.5" in html


def test_the_command(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    main([*runs, "--out", str(tmp_path / "both.html")])
    assert "both.html" in capsys.readouterr().out
    assert len(data_of((tmp_path / "both.html").read_text())["runs"]) == 2


def test_what_is_no_run_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    damaged = write_run(tmp_path / "damaged")
    lines = (damaged / "metrics.jsonl").read_text()
    (damaged / "metrics.jsonl").write_text("{}\n" + lines)
    cases = {
        (tmp_path / "nowhere",): "nowhere is not a training run",
        (run, run): "twice",
        (damaged,): "line 1 is not a line of metrics",
    }
    for folders, message in cases.items():
        with pytest.raises(SystemExit) as end:
            main([*map(str, folders), "--out", str(tmp_path / "page.html")])
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.startswith("error: ")
    with pytest.raises(SystemExit):
        main([str(run), "--out", str(tmp_path / "page.pdf")])
    sheet = run / "samples" / "000000000.png"
    head, data = sheet.read_bytes().split(b"IDAT")
    shorter = head[:-4] + b"\0\0\0\x10IDAT" + data  # what follows its 16 bytes reads as a chunk of no kind
    for content in (b"no picture", shorter):
        sheet.write_bytes(content)
        with pytest.raises(DataError, match="not a picture"):
            page([read_run(run)])
    assert not (tmp_path / "page.html").exists()


def test_a_line_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 99')
    assert read_run(run).images == 4000


@pytest.mark.usefixtures("plain")
def test_training_keeps_the_page_and_records_what_it_shows(inputs, tmp_path, capsys):
    config = tiny_config(inputs, run_dir=tmp_path / "run", duration_mimg=3.2e-5, checkpoint_ticks=2)
    distill(config)
    run = read_run(tmp_path / "run")
    data = data_of((tmp_path / "run" / "report.html").read_text())
    assert [sheet["images"] for sheet in data["runs"][0]["sheets"]] == [0, 8, 16, 24, 32]
    assert data["runs"][0]["columns"]["images"] == [8, 16, 24, 32]
    line = run.lines[-1]
    for name in ("grad_norm_g", "grad_norm_d", "grad_norm_r1", "minutes", "peak_host_gib"):
        assert line[name] > 0, name
    assert all(0 <= line[f"sign_accuracy_{kind}"] <= 1 for kind in ("real", "fake"))
    minutes = [line["minutes"] for line in run.lines]
    assert minutes == sorted(minutes)
    # the sheets that the others are compared with are what the teacher makes of the same noise
    teacher = load_generator(inputs / "teacher")
    images = [b.images for b in generate(teacher, range(64), SamplerConfig("heun"), batch=4)]
    save_grid(torch.cat(images), tmp_path / "expected.png")
    assert (tmp_path / "run" / "samples" / "teacher.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    frozen = 1 - run.unet["trained"] / run.unet["total"]
    assert f"frozen {100 * frozen:.1f} %" in (tmp_path / "run" / "report.html").read_text()
    for layer in run.unet["enc"] + run.unet["dec"]:
        for slot, cell in layer.get("cells", {}).items():
            assert cell["trained"] == (0 if slot in ("conv0", "conv1", "proj") else cell["total"]), slot
    # a page that cannot be written is said and ends no run
    (tmp_path / "run" / "samples" / "000000000.png").write_bytes(b"no picture")
    distill(tiny_config(inputs, run_dir=tmp_path / "run", duration_mimg=4e-5))
    assert "report.html was not written" in capsys.readouterr().err
    assert read_run(tmp_path / "run").images == 40 and read_run(tmp_path / "run").lines[-1]["minutes"] > minutes[-1]
