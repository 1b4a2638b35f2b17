"""The ledger's statistics against references; the whole list of experiments with a page, for two
seeds; and the lessons, which look at them."""
import html.parser
import itertools
import json
import math
import re
import shutil
import sys
from fnmatch import fnmatch
from importlib import import_module
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from conftest import ROOT, run
from nbclient import NotebookClient
from scipy import stats

from lab import base, claims, experiments, figures, page as pages
from lab.record import Stage

sys.path.insert(0, str(ROOT / "lessons"))
import lesson  # noqa: E402


# ---------------------------------------------------------------- verdicts and intervals

@pytest.mark.parametrize(
    "low, high, criterion, seeds, expected",
    [
        (0.1, 0.3, (0, None), 3, "holds"),
        (-0.3, -0.1, (0, None), 3, "fails"),
        (-0.1, 0.1, (0, None), 3, "open"),
        (0.1, 0.3, (None, 0.5), 3, "holds"),
        (0.6, 0.7, (None, 0.5), 5, "fails"),
        (0.4, 0.6, (None, 0.5), 3, "open"),
        (0.21, 0.29, (0.2, 0.3), 3, "holds"),
        (0.31, 0.35, (0.2, 0.3), 3, "fails"),
        (0.1, 0.15, (0.2, 0.3), 3, "fails"),
        (0.15, 0.25, (0.2, 0.3), 3, "open"),
        (0.1, 0.4, (0.2, 0.3), 3, "open"),
        (0.0, 0.0, (0, None), 3, "fails"),  # no difference at all is not "greater"
        (0.1, 0.3, (0, None), 2, "open"),
        (0.1, 0.3, (0, None), 1, "open"),  # too few seeds
        (math.nan, math.nan, (0, None), 3, "open"),])
def test_verdict(low, high, criterion, seeds, expected):
    assert claims.verdict(low, high, criterion, seeds) == expected


def test_interval_within_a_seed_is_scipy_s():
    x = np.random.default_rng(0).normal(size=200)
    low, high = claims.interval(lambda d, pick: d[pick(len(d))].mean(), [x],
                                np.random.default_rng(1), 4000)
    expected = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=4000,
                               rng=2).confidence_interval
    assert abs(low - expected.low) < 0.01 and abs(high - expected.high) < 0.01
    # and the normal approximation's
    half = 1.96 * x.std() / len(x) ** 0.5
    assert abs(low - (x.mean() - half)) < 0.02 and abs(high - (x.mean() + half)) < 0.02


def test_interval_over_seeds_is_that_of_all_draws():
    # three seeds of the same mean, two pairs each: 2^6 draws, and no spread for Student's t
    means = [np.mean(draw) for draw in itertools.product((0, 1), repeat=6)]
    low, high = claims.interval(lambda d, pick: d[pick(2)].mean(), [np.array([0, 1])] * 3,
                                np.random.default_rng(0), 20000)
    expected = np.percentile(means, [2.5, 97.5])
    assert abs(low - expected[0]) < 0.03 and abs(high - expected[1]) < 0.03


def bootstrap(measure, seeds, rng, replicates):
    """A percentile bootstrap over seeds and inside each, alone: (low, high)."""
    return np.percentile([np.mean([measure(seeds[s], lambda n: rng.integers(n, size=n))
                                   for s in rng.integers(len(seeds), size=len(seeds))])
                          for _ in range(replicates)], [2.5, 97.5])


def test_interval_over_few_seeds_covers():
    """Five seeds that differ, 200 pairs each, truth 0: as often as 95 % promise, where a bootstrap
    alone is too narrow."""
    inside = before = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        seeds = [rng.normal(rng.normal(), 0.5, 200) for _ in range(5)]
        low, high = claims.interval(lambda d, pick: d[pick(200)].mean(), seeds, rng, 200)
        inside += low < 0 < high
        low, high = bootstrap(lambda d, pick: d[pick(200)].mean(), seeds, rng, 200)
        before += low < 0 < high
    assert inside >= 90 and before < 90


def test_interval_of_one_number_a_seed_is_student_s():
    values, rng = [0.1, 0.4, 1.0, 1.2], np.random.default_rng(0)
    found = claims.interval(lambda d, pick: d, values, rng)
    mean, half = np.mean(values), 3.182446 * np.std(values, ddof=1) / 2  # t of 3 degrees, 97.5 %
    assert found == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert claims.interval(lambda d, pick: d, [0.5], rng) == (0.5, 0.5)  # its claim stays open


def test_the_least_of_several_that_are_equal_rarely_fails():
    """Four policies as good as their opponent, 400 prompts, three seeds: that the least of them
    does not win is found as seldom as 95 % promise; a bootstrap of the least finds it in half."""
    def least(d, pick):
        return [x[pick(400)].mean() for x in d]
    failed = before = 0
    for trial in range(30):
        rng = np.random.default_rng(trial)
        seeds = [rng.choice([-1, 0, 1], size=(4, 400)) for _ in range(3)]
        failed += claims.interval(least, seeds, rng, 200)[1] <= 0
        before += bootstrap(lambda d, pick: min(least(d, pick)), seeds, rng, 200)[1] <= 0
    assert failed <= 3 and before >= 10
    low, high = claims.interval(lambda d, pick: [d[0], d[0] + pick(1)[0] * 0 + 1], [(0.5,)] * 3,
                                np.random.default_rng(0), 50)
    assert (low, high) == (0.5, 0.5)


def test_interval_of_constants_is_a_point():
    found = claims.interval(lambda d, pick: d[pick(3)].mean(), [np.full(3, 0.7)] * 3,
                            np.random.default_rng(0), 50)
    assert found == pytest.approx((0.7, 0.7))


def test_accuracy_is_on_gold_s_labels_where_there_are_any():
    gold = np.array([[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    curve = {"step": [0, 36, 100], "gold_step": [36, 66, 100],
             "right": {"judge": np.array([[0, 0]] * 3), "gold": gold}}
    assert claims.final({"a": curve}, np.arange) == {"a": 1.0}
    assert claims.late_change(curve, np.arange(4), "gold") == 0.5
    del curve["right"]["gold"]
    assert claims.final({"a": curve}, np.arange) == {"a": 0.0}
    curve["right"] = {"original": np.array([[0, 1], [0, 1], [1, 1]])}  # nothing else is known
    assert claims.final({"a": curve}, np.arange) == {"a": 1.0}
    assert claims.late_change(curve, np.arange(2), claims.truth({"a": curve})) == 0.5


@pytest.mark.parametrize("epochs, total", [
    (3.0, 288), (2.5, 239), (1.667, 159), (1.0, 96), (1.2, 12)])
def test_each_epoch_s_last_step_is_evaluated_whatever_eval_every_is(epochs, total):
    stage = SimpleNamespace(args=SimpleNamespace(eval_every=10**6, epochs=epochs), total=total,
                            check=lambda step: None)
    ends = {math.ceil(total * k / epochs) for k in range(1, int(epochs) + 1)}
    assert [s for s in range(1, total + 1) if Stage.due(stage, s)] == sorted(ends | {total})
    del stage.args.epochs  # PPO has steps only
    assert [s for s in range(1, total + 1) if Stage.due(stage, s)] == [total]


def test_prompts_without_a_verdict_are_left_out():
    verdicts = claims.as_arrays({"p": {"sft": [1, None, 0, -1, 1]}})
    assert claims.wins(verdicts, "p", "sft", np.arange(5)) == 0.5
    assert claims.lead(verdicts, "p", "sft", np.arange(5)) == 0.25


def test_what_does_not_match_does_not_end_the_page():
    """Unequal rounds, a seed whose experiments are not over, a judge without a verdict."""
    steps = claims.as_arrays({"gold": [[1.0, None], [2.0]]})
    assert [x.tolist() for x in steps["gold"]][1] == [2.0]
    curve = {"step": [1, 2], "right": {"original": [[0, 1], [1, 1]], "train": [[0, 1], [1, 1]]},
             "train_loss": [0.7, 0.6]}
    seeds = [{"flip_3_epochs": curve}, {"flip": curve}]
    for draw in (figures.draw_08, figures.draw_models):
        figure, table = draw(seeds)
        assert figure.axes and table[1][1:] == figures.final_table(seeds[:1])[1][1:]
    figure, table = figures.draw_wins(("sft",))([{"comparisons": []}])
    assert figure is None and len(table) == 1


def test_the_claims_on_metarm_on_made_up_rounds():
    """J below vanilla's at theta and above it at theta'; a rise of its first order; eta 0 has
    none."""
    def held(seed, eta=0.1):
        return {f"round_{r}": {"theta": {"J": [0.40, 0.41]}, "theta_prime": {"J": [0.44, 0.45]},
                               "vanilla": {"J": [0.42, 0.43]}, "rise": {
                                   "measured": eta * (1.02 + 0.01 * seed), "first_order": eta}}
                for r in (1, 2)}
    found = {e["id"]: e for e in claims.ledger({"figure_16": {f"seed_{s}": held(s)
                                                              for s in range(3)}})}
    assert found["C18"]["verdict"] == "fails" and found["C18"]["mean"] == pytest.approx(-0.02)
    assert found["C18b"]["verdict"] == "holds" and found["C18b"]["mean"] == pytest.approx(0.02)
    assert found["C18c"]["verdict"] == "holds" and found["C18c"]["mean"] == pytest.approx(1.03)
    none = {e["id"]: e for e in claims.ledger({"figure_16": {"seed_0": held(0, 0.0)}})}
    assert none["C18c"]["verdict"] == "not measured" and none["C18"]["verdict"] == "open"


def test_a_claim_that_holds_fails_and_is_missing():
    """The ledger on made-up figures: a third of the pairs below 0 in one world, a quarter in
    another."""
    def seeds(share):
        mean = [-1.0] * round(4000 * share) + [1.0] * round(4000 * (1 - share))
        return {f"seed_{s}": {"mean": mean, "std": [1.0] * 4000} for s in range(3)}
    entries = {e["id"]: e for e in claims.ledger({"figure_01": seeds(0.25)})}
    assert entries["C1"]["verdict"] == "holds" and entries["C1"]["mean"] == 0.25 and set(
        entries["C1"]["values"].values()) == {0.25}
    # a flat std is no U
    assert entries["C2"]["verdict"] == "fails"
    assert entries["C9"]["verdict"] == "not measured" and "figure_07" in entries["C9"]["reason"]
    assert {e["id"]: e
            for e in claims.ledger({"figure_01": seeds(0.4)})}["C1"]["verdict"] == "fails"


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=7), rng.normal(size=7)
    for n in range(1, 8):
        draws = [
            values[max(draw, key=lambda i: rewards[i])]
            for draw in itertools.combinations(range(7), n)]
        assert figures.best_of(rewards, values, n) == pytest.approx(np.mean(draws))


def test_roughness():
    line = np.linspace(3, 7, 20)
    assert claims.roughness(line) < 1e-9 and math.isnan(claims.roughness([1, 2, 3, 4]))
    noisy = line + np.tile([0.5, -0.5], 10)
    x = np.arange(10)
    expected = np.sqrt(np.mean((noisy[10:] - np.poly1d(np.polyfit(x, noisy[10:], 1))(x)) ** 2))
    assert claims.roughness(noisy) == pytest.approx(expected)


def test_variants_are_told_from_the_vanilla_model_by_pairs_of_one_seed():
    """Their differences' intervals are scipy's of the paired t test."""
    rng = np.random.default_rng(0)
    models = {name: {"kind": kind, "eta": eta} for name, kind, eta in (
        ("vanilla", "vanilla", 0.0), ("eta_0.1", "eta", 0.1), ("joint_1", "joint", 1.0))}
    seeds = [{"models": {name: {**m, **{key: rng.normal(size=1 if key == "accuracy" else 5)
                                        for key in ("J", "accuracy", "tau")}}
                         for name, m in models.items()},
              "comparisons": [{"set": "eval_harmless", "policy": policy, "opponent": opponent,
                               "win": rng.uniform(0.3, 0.6), "lose": rng.uniform(0.1, 0.4)}
                              for policy in ("more_1", "joint") for opponent in ("sft", "round_0")]
              } for _ in range(4)]

    def differ(a, b, form):
        low, high = stats.ttest_rel(a, b).confidence_interval()
        return f"{np.mean(a) - np.mean(b):{form}} ({low:{form}} to {high:{form}})"
    means = {m: [np.mean(s["models"][m]["J"]) for s in seeds] for m in models}
    lead = {policy: [100 * (row["win"] - row["lose"]) for s in seeds for row in s["comparisons"]
                     if (row["policy"], row["opponent"]) == (policy, "round_0")]
            for policy in ("more_1", "joint")}
    _, table = figures.draw_variants(seeds)
    found = {row[0]: row for row in table}
    assert found["L - eta J, eta 1"][1] == (
        f"{np.mean(means['joint_1']):.3f}, {differ(means['joint_1'], means['vanilla'], '+.3f')}")
    assert found["PPO under L - eta J against round 0, eval_harmless"][2].startswith(
        differ(lead["joint"], lead["more_1"], "+.1f"))
    fewer = [{**s, "comparisons": [r for r in s["comparisons"] if k or r["policy"] != "joint"]}
             for k, s in enumerate(seeds)]  # the first seed has no such policy
    row = {r[0]: r for r in figures.draw_variants(fewer)[1]}[
        "PPO under L - eta J against round 0, eval_harmless"]
    assert row[2].startswith(differ(lead["joint"][1:], lead["more_1"][1:], "+.1f"))
    alone = [{**s, "comparisons": [r for r in s["comparisons"] if r["policy"] == "joint"]}
             for s in seeds]
    assert [r[2] for r in figures.draw_variants(alone)[1] if r[0].startswith("PPO")] == [""]
    _, one = figures.draw_variants(seeds[:1])
    assert len(one) > 4 and not any("(" in row[1] for row in one)  # one seed has no interval


def test_wins_counts_ties_as_neither():
    verdicts = {"a": {"b": np.array([1, 0, 0, -1])}}
    assert claims.wins(verdicts, "a", "b", np.arange(4)) == 0.25
    assert claims.lead(verdicts, "a", "b", np.array([0, 0, 1, 2])) == 0.5


def evaluation(**rounds):
    """One task's verdicts against SFT and round 0 on eight prompts, round 1 chosen on the even."""
    against = {name: {"sft": np.array(v), "round_0": np.array(v)} for name, v in rounds.items()}
    return {"table_2": {"best": {"harmless": "round_1"}, "unseen": {
        "eval_harmless": np.arange(1, 8, 2)}, "verdicts": {"eval_harmless": against}}}


def test_the_best_round_is_measured_on_other_prompts():
    """Round 1 looks best on the even prompts by chance only: on the odd ones it is no better."""
    d = evaluation(round_0=[0] * 8, round_1=[1, -1] * 4, round_2=[0] * 8)
    assert claims.best_beats_vanilla(d, np.arange, "eval_") == -1
    assert claims.falls_after_best(d, np.arange) == 0  # no win of either on the odd ones


def test_a_seed_that_lacks_a_figure_is_left_out_of_its_claims():
    """Two seeds have Figure 1, one has nothing of it: the claim's values are the two's, too few for
    a verdict."""
    whole = {"mean": [-1.0] * 10 + [1.0] * 30, "std": [1.0] * 40}
    entries = {
        e["id"]: e for e in claims.ledger({
            "figure_01": {"seed_0": whole, "seed_2": whole}, "equation_17": {
                "seed_1": {"whole": [0.5], "fixed": [1.0]}}})}
    assert entries["C1"]["values"] == {"seed_0": 0.25, "seed_2": 0.25
                                       } and entries["C1"]["verdict"] == "open"
    assert entries["C28b"]["values"] == {"seed_1": 1.0}


def test_more_ppo_is_shown_as_far_as_there_are_rounds_beside_it(tmp_path):
    names = ["round_0", "round_1", "round_2", "more_1", "more_2", "more_3"]
    (tmp_path / "08_evaluate").mkdir()
    for have, want in ((names, names[:5]), (["round_0", "more_1"], None)):
        (tmp_path / "08_evaluate/tables.json").write_text(json.dumps(
            {"mean_score": {name: {"eval_x": 0.5, "ood_x": 0.1} for name in have}}))
        figures.read.cache_clear()
        if want:
            found = figures.data_more(SimpleNamespace(path=tmp_path, summary=None))
            assert list(found) == ["eval_x"] and sorted(found["eval_x"]) == sorted(want)
            assert figures.draw_more([found])
        else:
            with pytest.raises(figures.Missing, match="more_1"):
                figures.data_more(SimpleNamespace(path=tmp_path, summary=None))


def test_one_round_is_too_few_to_rise_or_fall():
    d = evaluation(round_0=[0] * 8, round_1=[1] * 8)
    assert math.isnan(claims.first_rounds_rise(d, np.arange))
    assert math.isnan(claims.falls_after_best(d, np.arange))
    assert claims.best_beats_vanilla(d, np.arange, "eval_") == 1
    assert math.isnan(claims.best_beats_vanilla(d, np.arange, "ood_"))


def test_names_are_those_of_the_stages():
    for name, mine in (("04_rm_denoise", figures.METHODS), ("05_rm_contrastive",
                                                            figures.CONTRASTIVE)):
        assert mine == list(import_module(name).METHODS)


# ---------------------------------------------------------------- the list

def test_every_command_of_the_list_is_one_its_stage_takes(tmp_path):
    """Each line is parsed by its stage (--dry_run), no two write the same directory, and every
    figure has one."""
    for table in (experiments.pairs_table(5, 0.1, 0.001), experiments.summary_table(5)):
        names = [name for names, *_ in table for name in names]
        assert len(set(names)) == len(names)
        for *_, command in table:
            script, *flags = command.format(often=5, seldom=10, n=64, few=16, seed=0).split()
            stage = import_module(script.removesuffix(".py").replace("/", "."))
            with pytest.raises(SystemExit) as stop:
                stage.main([*flags, "--out", str(tmp_path), "--dry_run"])
            assert stop.value.code == 0
    made = [name for names, *_ in experiments.pairs_table(5, 0.1, 0.001) for name in names]
    for name, (_, _, patterns, _, _) in figures.FIGURES.items():
        for pattern in patterns:
            assert any(fnmatch(m, pattern) for m in made), f"{name}: {pattern}"


def test_the_driver_prints_the_list(tmp_path):
    out = tmp_path / "out"
    lines = run("bash", "run_all.sh", "experiments", "--dry_run", "--gpus", 2, "--seeds", 2,
                "--limit=2", f"--out={out}").stdout.splitlines()
    rows = experiments.pairs_table(2, 0.1, 0.001) + experiments.summary_table(2)
    assert len(lines) == 2 * len(rows) and not out.exists()
    assert lines[0].split("  #")[0].strip() == f"00_data.py --limit 2 --seed 0 --out {out}/seed_0"


def test_a_run_and_experiments_do_not_share_a_directory(tmp_path):
    for place, command in (("run.json", ["lab/experiments.py", "--seeds",
                                         1]), ("seed_0/run.json", None)):
        out = tmp_path / place.replace("/", "_")
        (out / place).parent.mkdir(parents=True)
        (out / place).write_text("{}")
        done = run(*(["python", *command] if command else ["bash", "run_all.sh"]), "--out", out,
                   check=False)
        assert done.returncode == 2 and "give" in done.stdout and "another --out" in done.stdout


# ---------------------------------------------------------------- in a browser

SIZES = [(width, scheme) for width in (400, 800, 1400) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    """Debian's or any other Chromium, driven by Playwright; None where there is none."""
    if not (binary := shutil.which("chromium") or shutil.which("google-chrome")):
        yield None
        return
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"]) as chromium:
            yield chromium


def seen_in(browser, path, width, scheme):
    """A page as Chromium shows it: (tab, what it logged or asked a network for, pixels that it is
    too wide)."""
    tab, heard = browser.new_context(viewport={"width": width, "height": 900},
                                     color_scheme=scheme).new_page(), []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url) if not request.url.startswith(
        ("file:", "data:")) else None)
    tab.goto(path.as_uri())
    return tab, heard, tab.evaluate("document.documentElement.scrollWidth - innerWidth")


def looked_at(browser, path, pictures):
    """A page of 09 from phone to desktop, light and dark, and on paper: nothing is asked of a
    network, nothing logged, nothing overflows, every figure is seen and has its text."""
    for width, scheme in SIZES:
        tab, heard, over = seen_in(browser, path, width, scheme)
        seen = tab.evaluate("""() => ({
            images: [...document.images].map(i => [i.naturalWidth, i.alt.length,
                i.checkVisibility(), i.getBoundingClientRect().height]),
            heads: [...document.querySelectorAll("table")].filter(t => !t.querySelector(
                "th[scope=col]")).length,
            grey: getComputedStyle(document.body).color + getComputedStyle(document.body
                ).backgroundColor})""")
        assert heard == [] and over <= 0 and seen["heads"] == 0, (width, scheme, seen)
        assert len(seen["images"]) >= pictures
        assert all(w > 100 and alt > 10 and shown and height > 50
                   for w, alt, shown, height in seen["images"]), (width, scheme)
        text, behind = (sum(map(int, c.split(","))) / 3 for c in re.findall(
            r"rgb\(([\d, ]+)\)", seen["grey"]))
        assert (text < 60 and behind > 200) if scheme == "light" else (text > 200 and behind < 60)
    assert len(tab.pdf(format="A4")) > 100_000


def test_chromium_shows_the_reader_and_the_lessons(browser):
    if not browser:
        pytest.skip("there is no Chromium here")
    for path in [ROOT / "docs/reader.html", *sorted((ROOT / "docs/lessons").glob("*.html"))]:
        for width, scheme in (SIZES[0], SIZES[-1]):
            tab, heard, over = seen_in(browser, path, width, scheme)
            assert heard == [] and over <= 0, (path, width)
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert tab.evaluate(broken) == 0
            formulas = tab.evaluate("document.querySelectorAll('math').length")
            assert (formulas > 0) == (path.stem != "lesson_7")


def test_contrast_is_wcag_s_aa():
    """4.5 to 1 for every text on what lies behind it, light and dark (WCAG 2.1, 1.4.3)."""
    def light(colour):
        digits = colour[1:] if len(colour) > 4 else "".join(2 * x for x in colour[1:])
        parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        return np.dot([0.2126, 0.7152, 0.0722], [
            x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts])

    def ratio(*colours):
        dark, bright = sorted(map(light, colours))
        return (bright + 0.05) / (dark + 0.05)
    assert ratio("#fff", "#000000") == pytest.approx(21)
    for form, names in (("page", ("text", "mute", "link")), ("reader", ("text", "mute", "link"))):
        css = (ROOT / f"lab/{form}.html").read_text(encoding="utf-8")
        schemes = [dict(re.findall(r"--(\w+): (#\w+)", of)) for of in re.findall(
            r":root {(.*?)}", css, re.DOTALL)]
        assert len(schemes) == 2
        for scheme in schemes:
            assert all(ratio(scheme[name], scheme[behind]) >= 4.5
                       for name in names for behind in ("page", "soft")), (form, scheme)
    badges = re.findall(r"\.(?:holds|fails|not) { background: (#\w+)", (
        ROOT / "lab/page.html").read_text(encoding="utf-8"))
    assert len(badges) == 3 and all(ratio("#fff", b) >= 4.5 for b in badges)


def test_chromium_shows_the_page_of_experiments(page, browser):
    if not browser:
        pytest.skip("there is no Chromium here")
    looked_at(browser, page[0] / "09_report/index.html", 28)


# ---------------------------------------------------------------- the page

class Page(html.parser.HTMLParser):
    """Ids, sources, links and the balance of the tags."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.images, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes[k] for k in ("src", "href", "srcset") if k in attributes]
        self.images += [attributes["src"]] if tag == "img" else []
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def test_figures_name_their_judge(tmp_path):
    """A judge's name and how often it changed its mind stand beside what it judged."""
    asked = {"judge": "model:m", "items": 9, "not_asked": 1, "none": 0, "asked_in_both_orders": 4,
             "flip_rate": 0.5}
    for stage, metrics in (("03_strength", {"judge": asked}),
                           ("08_best_of_n", {"judge": "gold"}),
                           ("08_evaluate", {"judge": "ensemble, a proxy",
                                            "report": {"judge": "ensemble, a proxy"}})):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"metrics": metrics}))
    assert pages.judged(tmp_path) == {
        "03_strength": "judge model:m: 9 items, 1 not asked, 0 without a verdict, 50% of 4 items "
        "judged otherwise in the other order", "08_best_of_n": "judge gold",
        "08_evaluate": "judge ensemble, a proxy"}


SMALL = ["--limit", 1, "--seeds", 1, "--max_response_tokens", 12, "--max_prompt_tokens", 32,
         "--n_pairs", 400, "--n_sft", 300, "--n_prompts", 300]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The whole list of experiments, as small as it goes, a second seed that is a copy of the first
    (a minute less), and their page. → (out, the output)."""
    out = tmp_path_factory.mktemp("experiments") / "out"
    text = run("python", "lab/experiments.py", *SMALL, "--out", out).stdout
    for name in ("seed", "summary"):
        shutil.copytree(out / f"{name}_0", out / f"{name}_1")
    return out, text + run("python", "09_report.py", "--out", out).stdout


def test_the_page_has_every_figure_table_and_claim(page):
    out, text = page
    parsed = Page((out / "09_report/index.html").read_text())
    assert not parsed.open
    assert set(figures.FIGURES) | {claim for claim, *_ in claims.CLAIMS} <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {re.sub(r"\D", "", claim) for claim, *_ in claims.CLAIMS} == {
        str(n) for n in range(1, 29)}
    numbers = {
        int(n)
        for title, *_ in figures.FIGURES.values()
        for n in re.findall(r"^Figure (\d+)", title)}
    assert numbers == {*range(1, 29)} - {14, 18}  # two drawings
    assert len(json.loads(
        (out / "09_report/ledger.json").read_text())["claims"]) == len(claims.CLAIMS)
    assert "stages are complete" in text and "Traceback" not in text


def test_the_page_needs_nothing_else_and_its_images_are_whole(page):
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image
    text = (page[0] / "09_report/index.html").read_text()
    assert text.index("id=ledger") < text.index("id=figure_01") < text.index("id=figure_02")
    parsed = Page(text)
    assert all(r.startswith(("data:image/png;base64,", "#")) for r in parsed.references)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert all(r[1:] in parsed.ids for r in parsed.references if r.startswith("#"))
    assert len(parsed.images) >= 28
    for source in parsed.images:
        image = Image.open(BytesIO(b64decode(source.partition(",")[2])))
        image.load()
        assert min(image.size) > 100


def test_figures_json_reproduces_the_ledger(page):
    """Each value of the ledger, from the figures' JSON files alone; and some of them from the
    stages' own files."""
    folder = page[0] / "09_report"
    data = {f.stem: json.loads(f.read_text()) for f in (folder / "figures").glob("*.json")}
    entries = {e["id"]: e for e in json.loads((folder / "ledger.json").read_text())["claims"]}
    measured = 0
    for claim, *_, measure in claims.CLAIMS:
        if "values" in entries[claim]:
            assert list(entries[claim]["values"]) == ["seed_0", "seed_1"]
            for seed, value in entries[claim]["values"].items():
                d = {name: claims.as_arrays(seeds[seed]) for name, seeds in data.items()}
                assert float(np.min(measure(d, np.arange))) == value
            measured += 1
            assert entries[claim]["interval"][0] <= entries[claim]["interval"][1]
        assert entries[claim]["verdict"] in ("open", "not measured")  # two seeds
    assert measured >= 28
    manifest = json.loads((page[0] / "seed_1/03_strength/manifest.json").read_text())
    assert entries["C1"]["values"]["seed_1"] == pytest.approx(
        manifest["metrics"]["share_mean_below_zero"])
    accuracy = [
        json.loads(
            (page[0] /
             f"seed_1/04_rm_denoise/{name}/manifest.json").read_text())["metrics"]["accuracy_gold"]
        for name in ("margin", "baseline", "tenth_01", "tenth_02")]
    assert entries["C9"]["values"]["seed_1"] == pytest.approx(accuracy[0] - accuracy[1])
    assert entries["C4"]["values"]["seed_1"] == pytest.approx(np.mean(accuracy[2:]))
    tables = json.loads((page[0] / "seed_1/08_evaluate/tables.json").read_text())
    row = next(r for r in tables["comparisons"] if (r["policy"], r["set"], r["opponent"]) == (
        "round_2", "eval_harmless", "sft"))
    found = claims.as_arrays(data["table_2"]["seed_1"]["verdicts"]["eval_harmless"])
    assert claims.wins(found, "round_2", "sft", np.arange(row["n"])) == pytest.approx(row["win"])
    assert claims.lead(found, "round_2", "sft", np.arange(row["n"])) == pytest.approx(
        row["win"] - row["lose"])
    held = [
        json.loads((page[0] / f"seed_1/07_metarm/round_{r}/manifest.json").read_text())["metrics"]
        for r in (1, 2)]
    assert entries["C18"]["values"]["seed_1"] == pytest.approx(
        np.mean([m["J_theta"] - m["J_vanilla"] for m in held]), abs=1e-6)


def test_equation_17_holds_with_grad_J_fixed(page):
    """The run's own model: the sense in which tests/test_metarm.py shows it on a small function."""
    d = json.loads((page[0] / "09_report/figures/equation_17.json").read_text())["seed_0"]
    assert min(d["fixed"]) > 0.99


def test_experiments_are_verified_run_by_run(page):
    """The report changed nothing of them; one byte does, and is named."""
    done = run("bash", "run_all.sh", "verify", "--out", page[0])
    assert done.stdout.count("== ") == 4 and done.stdout.count("stages hold") == 4
    assert run("bash", "run_all.sh", "verify", page[0], check=False).returncode == 2


def test_finished_experiments_are_not_run_again(page):
    out = page[0]
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/*/manifest.json")}
    text = run("python", "lab/experiments.py", *SMALL, "--out", out).stdout
    count = re.search(r"(\d+) of (\d+) stages are complete", text)
    assert count[1] == count[2] and {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_other_flags_on_finished_experiments_are_refused(page):
    done = run("python", "lab/experiments.py", "--limit", 3, "--seeds", 1, "--out", page[0],
               check=False)
    assert done.returncode == 2 and "--limit (1 then, 3 now)" in done.stdout
    assert "seed_0 was made with other flags (" in done.stdout


def test_a_single_run_without_gold_gets_a_page(page, tmp_path, browser):
    """One run directory, its data without gold, judge and texts to show: what needs them is left
    out by name."""
    out = shutil.copytree(page[0] / "seed_0", tmp_path / "out")
    info = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**info, "world": None}))
    for split in ("train", "valid"):
        path = out / f"03_strength/{split}.jsonl"
        kept = [{
            k: v
            for k, v in json.loads(line).items()
            if k not in ("judge_label", "gold_chosen", "gold_rejected")}
                for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for path in out.glob("04_rm_denoise/*/scores.jsonl"):
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "gold"}) + "\n"
                                for row in kept))
    consistency = out / "03_strength/consistency.json"
    consistency.write_text("{}")
    tables = out / "08_evaluate/tables.json"  # as if 08 had run before more_1 was made
    kept = json.loads(tables.read_text())
    del kept["mean_score"]["more_1"]
    tables.write_text(json.dumps(kept))
    found = pages.find_runs(out)
    collected, absent = pages.collect(found, show_texts=False)
    assert "judge" in absent["figure_03"] and "more_1" in absent["more"] and set(
        pages.TEXTS) <= set(absent)
    entries = claims.ledger(collected)
    (tmp_path / "figures").mkdir()
    text = pages.page(found, entries, collected, absent, tmp_path / "figures")[0]
    (tmp_path / "index.html").write_text(text)
    browser and looked_at(browser, tmp_path / "index.html", 16)
    parsed = Page(text)
    assert set(figures.FIGURES) <= set(parsed.ids)
    first, paper, absent_, claims_ = (text.index(f"id={name}") for name in (
        "figure_01", "paper", "absent", "ledger"))
    assert first < text.index("id=accuracies") < text.index("id=table_2") < paper
    assert paper < claims_ < absent_ < text.index("id=table_1") and text.count("id=absent") == 1
    verdicts = {e["id"]: e["verdict"] for e in entries}
    assert set(verdicts.values()) == {"open", "not measured"}
    assert verdicts["C3"] == "not measured"  # the others take the labels as they came
    assert all(verdicts[c] == "open" for c in ("C4", "C7", "C9", "C10", "C11"))


def test_the_page_of_a_run_that_goes_on(page, tmp_path):
    """09 at any time: what is finished is shown, what is coming is named; nothing is left behind
    that the run would miss."""
    out = shutil.copytree(page[0] / "seed_0", tmp_path / "out", ignore=shutil.ignore_patterns(
        "0[5-9]_*", "part_*", "tenth_*", "*_3_epochs", "soft_margin"))
    (out / "04_rm_denoise/soft_margin.partial").mkdir()  # being trained, by a process with the lock
    base.lock(out)
    for keep in ("04_rm_denoise", "00_data"):
        text = run("python", "09_report.py", "--out", out).stdout
        assert "done in" in text and "Traceback" not in text
        written = (out / "09_report/index.html").read_text()
        assert not Page(written).open and "06_ppo/round_0" in written.partition("</header>")[0]
        coming = re.search(r"once it is: (.*)$", written, re.M)[1].split(", ")
        assert coming[-5:] == ["05_rm_contrastive", "06_ppo/round_0", "07_metarm/round_1",
                               "06_ppo/round_1", "08_evaluate"]
        assert ("03_strength" in coming) == (keep == "00_data")
        assert ("id=accuracies><h3>" in written) == (keep == "04_rm_denoise")
        for name in ("02_rm_ensemble", "03_strength", "04_rm_denoise", "01_sft"):
            shutil.rmtree(out / name, ignore_errors=True)
    assert "id=figure_01><h3>" not in written and "02_rm_ensemble" in written


def test_reward_and_gold_part_where_gold_is_highest(tmp_path):
    """On made-up rounds: gold rises to the end, or turns at a known step."""
    def part(gold):
        for r in range(2):
            folder = tmp_path / f"06_ppo/round_{r}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(dict.fromkeys(
                figures.UNITS, 0.0) | {"reward": i, "reward_std": 2.0, "gold": g}) + "\n"
                for i, g in enumerate(gold[20 * r:20 * r + 20])))
        figures.read.cache_clear()
        return figures.data_parting(pages.SimpleNamespace(path=tmp_path))
    rises = np.linspace(0, 1, 40).tolist()
    assert part(rises)["part"] is None
    assert part(rises)["reward"] == [[i / 2 for i in range(20)]] * 2
    assert part(rises[:30] + rises[:10][::-1])["part"] == 30  # the last step of the highest mean
    noise = [np.random.default_rng(seed).normal(size=40).tolist() for seed in range(40)]
    assert sum(part(x)["part"] is not None for x in noise) <= 5  # 2 are to be expected


# ---------------------------------------------------------------- the lessons

LESSONS = sorted((ROOT / "lessons").glob("lesson_?.ipynb"))


def answers(path):
    """{exercise: the solution's code} of a lesson."""
    text = (path.parent / f"solutions/{path.stem}.py").read_text(encoding="utf-8")
    return {m[1]: m[2] for m in re.finditer(r"^# (\d\w)$(.*?)(?=^# \d\w$|\Z)", text, re.M | re.S)}


def execute(path):
    """The notebook's outputs as text, its exercises solved."""
    book, found = nbformat.read(path, 4), answers(path)
    for cell in book.cells:
        if "exercise" in cell.metadata.get("tags", ()):
            cell.source = found.pop(re.search(r"answer_(\d\w)", cell.source)[1])
    assert not found, "a solution without its exercise"
    NotebookClient(book, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    return "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", ()))


@pytest.fixture
def small(page, monkeypatch):
    """A run that has all that lessons look at."""
    monkeypatch.setenv("LESSON_RUN", str(page[0] / "seed_0"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_runs_whole(small, path):
    text = execute(path)
    assert re.findall(r"^(\d\w): right\.$", text, re.M) == list(answers(path)), text
    assert "Traceback" not in text and "making" not in text  # all is there


WRONG = {
    "1a": [0.5, 1, "x"], "1b": [lambda d: d, lambda d: -d.sigmoid(), lambda d: 0],
    "2a": [lambda d: (d.mean(0), d.std(0)), lambda d: (d.mean(1), d.std(1)), lambda d: None],
    "2b": [0.2, -1], "3a": [lambda a, m: 0, lambda a, m: m, lambda a: 1], "3b": [1.5],
    "4a": [0, 32, 1.0], "4b": [lambda h: h, lambda h: (h[:, 0] - h[:, 1]).repeat(2, 1)],
    "5a": [lambda n: n, lambda n: 0], "5b": [[1, 1, 1], [0.5], 0.5],
    "6a": [lambda k: 0, lambda k: 0.5], "6b": [
        lambda t, dL, dJ, a, e: t - a * dL(t), lambda t, dL, dJ, a, e: t + e * dJ(t) - a * dL(
            t + e * dJ(t))],
    "7a": [lambda row: row, lambda row: {"prompt": row["question"], "chosen": row["bad"],
                                         "rejected": row["good"]}],
    "7b": [lambda rows: rows, lambda rows: [], lambda rows: rows[:1]]}


@pytest.mark.parametrize("exercise", WRONG)
def test_a_wrong_answer_is_told_so(small, exercise, capsys):
    for answer in [..., None, *WRONG[exercise]]:
        assert not lesson.check(exercise, answer)
    said = capsys.readouterr().out
    assert said.count("not yet") == 2 and said.count("not right yet") == len(WRONG[exercise])


@pytest.mark.parametrize("command", lesson.MADE.values())
def test_commands_of_the_lessons_run_are_taken(page, command, capsys, monkeypatch):
    script, *flags = command.split()
    monkeypatch.setattr("sys.argv", [script])
    with pytest.raises(SystemExit) as stop:
        lesson.stage(script[:-3]).main([*flags, "--dry_run", "--out", str(page[0] / "seed_0")])
    assert not stop.value.code and '"stage"' in capsys.readouterr().out


def test_every_exercise_has_wrong_answers_here():
    assert {e for path in LESSONS for e in answers(path)} == WRONG.keys() == {
        name.removeprefix("check_") for name in vars(lesson) if name.startswith("check_")}
    assert [len(answers(path)) for path in LESSONS] == [2] * 7


def test_notebooks_are_stored_without_outputs_and_have_a_page():
    for path in LESSONS:
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        assert all(not c.get("outputs") and c.get("execution_count") is None for c in book.cells)
        assert any("Predict" in c.source for c in book.cells)
        assert max(len(line) for c in book.cells if c.cell_type == "code"
                   for line in c.source.split("\n")) <= 100
        built = (ROOT / f"docs/lessons/{path.stem}.html").read_text(encoding="utf-8")
        for exercise in answers(path):  # it ran with its exercises blank
            assert f"{exercise}: not yet" in built
        shown = html.unescape(re.sub(r"<[^>]*>", "", built))
        for cell in book.cells:  # as it is now: run python lessons/build.py
            if cell.cell_type == "code":
                assert cell.source in shown, cell.source
            else:
                bare = re.sub(r"\$\$[^$]*\$\$|\$[^$]*\$|\]\([^)]*\)", " ", cell.source)
                words = re.findall(r"\w{3,}", bare)
                assert set(words) <= set(re.findall(r"\w{3,}", shown)), cell.source
        assert "http" not in re.sub(r"http://www.w3.org\S*", "", built)
