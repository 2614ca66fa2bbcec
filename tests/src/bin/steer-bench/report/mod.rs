//! Writes the results: `docs/bench/results.json`, a picture for each figure in the same directory,
//! and the tables in `docs/benchmarks.md` and `README.md`. Everything is made from one [`Report`].
//! Nobody writes a number on these pages by hand.

mod figures;
mod goals;
mod pages;
mod svg;
#[cfg(test)]
mod tests;
mod unit;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::results::{Report, Series};

/// The directory of the pictures and the results.
const PICTURES: &str = "docs/bench";

/// The pages, and the places on each page that are generated.
fn pages() -> [(&'static str, Vec<&'static str>); 2] {
    let places = ["host", "goals"].into_iter().chain(figures::names());
    [("README.md", vec!["summary"]), ("docs/benchmarks.md", places.collect())]
}

/// Writes the pictures, results and tables of `report` into the repository at `root`. The same
/// report gives the same bytes.
///
/// # Errors
/// When a page does not have the markers of a place, or a file cannot be written.
pub(crate) fn write(report: &Report, root: &Path) -> Result<()> {
    let read =
        |page: &str| fs::read_to_string(root.join(page)).with_context(|| format!("cannot read {page}"));
    for (path, content) in files(report, read)? {
        let path = root.join(path);
        let parent = path.parent().context("the file has no directory")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// All files and their contents. `page` reads a page as it is now.
fn files(report: &Report, page: impl Fn(&str) -> Result<String>) -> Result<BTreeMap<PathBuf, String>> {
    // The pages are made from the rounded numbers, because the results file has the rounded
    // numbers.
    let report = &rounded(report);
    let figures = figures::of(report);
    let mut files = BTreeMap::from([(Path::new(PICTURES).join("results.json"), json(report)?)]);
    for figure in &figures {
        files.insert(Path::new(PICTURES).join(format!("{}.svg", figure.name)), svg::draw(figure)?);
    }
    for (name, places) in pages() {
        let text =
            pages::fill(&page(name)?, places, report, &figures).with_context(|| format!("in {name}"))?;
        files.insert(name.into(), text);
    }
    Ok(files)
}

/// The report as JSON, with one line for each series, so that `diff` can compare two reports.
pub(crate) fn json(report: &Report) -> Result<String> {
    let host = serde_json::to_string_pretty(&report.host)?;
    let results: Vec<String> = report.results.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let left_out = serde_json::to_string(&report.left_out)?;
    Ok(format!(
        "{{\"host\": {host},\n\"left_out\": {left_out},\n\"results\": [\n{}\n]}}\n",
        results.join(",\n")
    ))
}

/// The report with numbers rounded to their significant digits.
fn rounded(report: &Report) -> Report {
    let round = |value: &mut f64| *value = format!("{value:.5e}").parse().unwrap_or(*value);
    let mut report = report.clone();
    for Series { median, min, max, runs, steal_percent, .. } in &mut report.results {
        [median, min, max].into_iter().chain(runs).chain(steal_percent).for_each(round);
    }
    report
}
