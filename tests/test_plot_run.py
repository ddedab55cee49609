"""scripts/plot_run.py: pictures from whole, growing and dense logs; errors a user can act on."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "plot_run.py"


def step_record(step, experts):
    record = {"kind": "step", "step": step, "tokens": step * 100, "cross_entropy": 4 - step / 100,
              "learning_rate": 1e-4, "gradient_norm": None if step == 20 else 0.5}
    if experts:
        record["experts"] = [
            {"layer": 1, "load": [0.5, 0.5, 0.0], "max_over_mean": 1.5, "dead": 1},
            {"layer": 3, "load": [0.25] * 4, "max_over_mean": 1.0, "dead": 0},
        ]
    return record


def evaluation(step, name, perplexity):
    return {"kind": "eval", "step": step, "name": name, "loss": 4, "perplexity": perplexity}


class PlotRun(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.run_path = Path(folder.name) / "a_run"
        self.run_path.mkdir()

    def write(self, records, tail=""):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.run_path / "log.jsonl").write_text(text + tail)

    def plot(self, *arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True,
                              check=False)

    def assert_pictures(self, result, *paths):
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(result.stdout.split(), [str(path) for path in paths])
        for path in paths:
            self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def assert_error(self, result, text):
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertIn("plot_run: error: ", result.stderr)
        self.assertIn(text, result.stderr)
        self.assertNotIn("Traceback", result.stderr)

    def test_experts_and_a_half_written_last_line(self):
        event = {"kind": "event", "step": 20, "event": "skip", "text": "gradient norm nan"}
        self.write([evaluation(0, "start", 54.6), *(step_record(s, True) for s in (10, 20, 30)),
                    event, evaluation(30, "end", 40.4)], tail='{"kind":"st')
        plots = self.run_path / "plots"
        self.assert_pictures(self.plot(self.run_path), plots / "curves.png", plots / "experts.png")

    def test_a_dense_model_with_one_record(self):
        self.write([step_record(10, False)])
        out = self.run_path.parent / "elsewhere"
        self.assert_pictures(self.plot(self.run_path / "log.jsonl", "--out", out),
                             out / "curves.png")

    def test_damaged_lines_are_named(self):
        self.write([step_record(10, True)])
        log = self.run_path / "log.jsonl"
        log.write_text("garbage\n[]\n{}\n" + log.read_text())
        result = self.plot(self.run_path)
        self.assertEqual(result.returncode, 0)
        for line in (1, 2, 3):
            self.assertIn(f"log.jsonl:{line}: not a record", result.stderr)

    def test_perplexity(self):
        self.write([evaluation(0, "start", 54.598), evaluation(5, "valid", 50.0),
                    evaluation(10, "valid", 45.126), evaluation(20, "end", None)])
        self.assertEqual(self.plot(self.run_path, "--perplexity", "start").stdout, "54.60\n")
        self.assertEqual(self.plot(self.run_path, "--perplexity", "valid").stdout, "45.13\n")
        self.assert_error(self.plot(self.run_path, "--perplexity", "end"), "finite")
        self.assert_error(self.plot(self.run_path, "--perplexity", "middle"),
                          "found: end, start, valid")

    def test_comparison(self):
        self.write([step_record(step, False) for step in (10, 20, 30)])
        other = self.run_path.parent / "other.jsonl"
        records = [step_record(step, False) for step in (20, 30, 40)]
        records[1]["cross_entropy"] *= 0.98
        other.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.assertEqual(self.plot(self.run_path, "--compare", other).stdout,
                         "at most 2.04 % apart, at step 30 (3.7000 against 3.6260); 1.02 % in "
                         "the mean; means of 2 at most 1.00 %; 2 steps compared\n")
        records[0]["cross_entropy"] = None
        other.write_text(json.dumps(records[0]) + "\n")
        self.assert_error(self.plot(self.run_path, "--compare", other), "step 20 is not a number")
        other.write_text(json.dumps(records[2]) + "\n")
        self.assert_error(self.plot(self.run_path, "--compare", other), "no step in common")

    def test_missing_and_empty_logs(self):
        self.assert_error(self.plot(self.run_path / "absent"), "absent: no such file")
        self.assert_error(self.plot(self.run_path), "log.jsonl: no such file")
        self.write([evaluation(0, "start", 54.6)])
        self.assert_error(self.plot(self.run_path), "no training steps yet")
        self.write([step_record(10, False)])
        self.assert_error(self.plot(self.run_path, "--out", self.run_path / "log.jsonl" / "x"),
                          "cannot write")


if __name__ == "__main__":
    unittest.main()
