"""Commands about comparisons of methods: compare-methods."""

from __future__ import annotations

from pathlib import Path

from custom.errors import AliceError


def compare_methods(
    plan: str, scans: str | None = None, work: str | None = None, report: str | bool = False
) -> None:
    """Ask which method of pre-training is best on your scans, at the same cost: pre-train, fine-tune, score, report.

    A sweep that was stopped goes on where it was. docs/compare_methods.md says what stands in a plan.

    Args:
        plan: plan.yaml, or its folder.
        scans: folder, datalist or manifest; with labels where the plan fine-tunes.
        work: folder for everything that is made; the report lies in its report/.
        report: run nothing; report what is there: of WORK, or of a FOLDER that holds the rows of a report.
    """
    from custom.study.plan import read_plan
    from custom.study.report import collect, write_report
    from custom.study.sweep import Sweep

    asked = read_plan(plan)
    if isinstance(report, str):
        if scans or work:
            raise AliceError(
                "--report FOLDER makes a report again from the rows in FOLDER; it takes no scans and no work folder."
            )
        print(write_report(asked, Path(report)))
        return
    if not scans or not work:
        raise AliceError("Name the scans and a work folder: alice compare-methods PLAN SCANS WORK.")
    sweep = Sweep(asked, scans, work)
    if not report:
        sweep.run()
    folder = sweep.work / "report"
    missing = collect(asked, sweep.work, folder)
    print(write_report(asked, folder))
    print(f"The report is {folder / 'table.md'}.")
    if missing:
        told = "".join(f"\n  {name}: {sweep.failed.get(name, 'not made')}" for name in missing)
        raise AliceError(f"{len(missing)} runs are missing:{told}")
