//! The tables on the pages, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use super::figures::{Figure, Panel};
use super::goals::{Better, MEASURES};
use super::unit::{Unit, grouped, ratio};
use crate::results::{Host, Report};
use crate::subjects::Kind;

const END: &str = "<!-- /bench -->";

/// Returns `page` with new content in each of `places`.
pub(super) fn fill<'p>(
    page: &str,
    places: impl IntoIterator<Item = &'p str>,
    report: &Report,
    figures: &[Figure],
) -> Result<String> {
    places.into_iter().try_fold(page.to_owned(), |page, place| {
        let text = match place {
            "summary" => summary(report),
            "host" => host(&report.host),
            "goals" => goals(report),
            name => match figures.iter().find(|figure| figure.name == name) {
                Some(figure) => table(figure) + &left_out(report, figure),
                None => "Not measured in this run.\n".to_owned(),
            },
        };
        replace(&page, place, &text)
    })
}

fn replace(page: &str, place: &str, text: &str) -> Result<String> {
    let begin = format!("<!-- bench:{place} -->");
    let (before, rest) =
        page.split_once(&begin).with_context(|| format!("the page does not have {begin}"))?;
    let (_, after) =
        rest.split_once(END).with_context(|| format!("the page does not have {END} after {begin}"))?;
    Ok(format!("{before}{begin}\n{text}{END}{after}"))
}

/// The picture, and all values in a table below it.
fn table(figure: &Figure) -> String {
    let subjects = figure.subjects();
    let mut text = format!("![{}](bench/{}.svg)\n\n", figure.title, figure.name);
    line(&mut text, ["", ""].into_iter().chain(subjects.iter().map(|subject| subject.name())));
    line(&mut text, ["---", "---"].into_iter().chain(subjects.iter().map(|_| "---:")));
    for panel in &figure.panels {
        for (row, label) in figure.rows.iter().enumerate().filter(|(row, _)| !panel.cells[*row].is_empty()) {
            let values = subjects.iter().map(|subject| value(panel, row, *subject));
            line(&mut text, [panel.title.to_owned(), label.clone()].into_iter().chain(values));
        }
    }
    text
}

/// Which subjects could not do which loads, and why.
fn left_out(report: &Report, figure: &Figure) -> String {
    let mut text = String::new();
    for left in report.left_out.iter().filter(|left| left.workload == figure.workload) {
        let params: Vec<_> = left.params.iter().map(|(name, value)| format!("{name} {value}")).collect();
        text += &format!("\nLeft out: {} with {}: {}.\n", left.subject, params.join(", "), left.reason);
    }
    text
}

/// The median, and its ratio to the direct connection.
fn value(panel: &Panel, row: usize, subject: Kind) -> String {
    let Some(cell) = panel.cell(row, subject) else { return "–".into() };
    let value = panel.unit.show(cell.median);
    panel.to_direct(row, cell).map_or_else(|| value.clone(), |ratio| format!("{value} ({ratio})"))
}

fn goals(report: &Report) -> String {
    let mut text = String::new();
    line(&mut text, ["", "beside", "goal", "measured", ""]);
    line(&mut text, ["---", "---", "---:", "---:", "---"]);
    for measure in &MEASURES {
        let sign = if measure.better == Better::More { "≥" } else { "≤" };
        for (base, bound) in measure.goals {
            let measured = match base {
                Some(base) => measure.ratio(report, *base),
                None => measure.value(report, Kind::SteerPacket),
            };
            let shown = measured.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
            let verdict = match measured {
                Some(value) if measure.reaches(value, *bound) => "reached",
                Some(_) => "**missed**",
                None => "not measured",
            };
            let base = base.map_or("-", Kind::name);
            line(&mut text, [measure.what, base, &format!("{sign} {bound}"), &shown, verdict]);
        }
    }
    text
}

/// The table of README.md: ratios, and memory.
fn summary(report: &Report) -> String {
    const BESIDE: [Kind; 4] = [Kind::Direct, Kind::Haproxy, Kind::Nginx, Kind::Envoy];
    let mut text = String::new();
    line(&mut text, ["packet splice, as a multiple of"].into_iter().chain(BESIDE.map(Kind::name)));
    line(&mut text, ["---"].into_iter().chain(BESIDE.map(|_| "---:")));
    for measure in &MEASURES {
        let ratios = BESIDE.map(|base| measure.ratio(report, base).and_then(|value| ratio(value, 1.0)));
        if ratios.iter().any(Option::is_some) {
            let ratios = ratios.map(|ratio| ratio.unwrap_or_else(|| "–".into()));
            line(&mut text, [measure.what.to_owned()].into_iter().chain(ratios));
        }
    }
    text
}

/// The machine and the software of the run.
fn host(host: &Host) -> String {
    let mut text = String::new();
    line(&mut text, ["", ""]);
    line(&mut text, ["---", "---"]);
    let rows = [
        ("date", date(host.started)),
        ("profile", host.profile.clone()),
        ("kernel", host.kernel.clone()),
        ("processors", format!("{} × {}", host.cpus, host.cpu)),
        ("descriptors for each process", grouped(host.descriptors)),
        ("rounds", format!("{} of {} s, after a warm-up", host.rounds, host.span_seconds)),
        ("memory", Unit::Bytes.show(host.memory_bytes as f64)),
        ("CPU time stolen", format!("{:.1} %", host.steal_percent)),
        ("runs repeated because of that", grouped(host.repeated_runs)),
    ];
    for (name, value) in rows {
        line(&mut text, [name, &value]);
    }
    for (subject, version) in &host.versions {
        line(&mut text, [subject, version]);
    }
    text
}

/// Appends a row of a table.
fn line(text: &mut String, cells: impl IntoIterator<Item = impl AsRef<str>>) {
    text.push('|');
    for cell in cells {
        // Writing to a string cannot fail.
        write!(text, " {} |", cell.as_ref()).ok();
    }
    text.push('\n');
}

/// The date (UTC) of a number of seconds since 1970, by Howard Hinnant's `civil_from_days`.
fn date(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        let days = [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (1_795_446_909, "2026-11-23")];
        for (seconds, day) in days {
            assert_eq!(date(seconds), day);
        }
    }

    #[test]
    fn a_place_is_filled_and_filled_again() {
        let page = "a\n<!-- bench:x -->\nold\n<!-- /bench -->\nb\n<!-- bench:y -->\n<!-- /bench -->\n";
        let filled = replace(page, "x", "new\n").unwrap();
        assert_eq!(filled, page.replace("old", "new"));
        assert_eq!(replace(&filled, "x", "new\n").unwrap(), filled);
        assert!(replace(page, "z", "").is_err());
        assert!(replace("<!-- bench:x -->", "x", "").is_err());
    }
}
