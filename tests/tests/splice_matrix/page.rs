//! The tables of docs/splice.md, between `<!-- matrix:NAME -->` and `<!-- /matrix -->`.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};

use crate::bed::Cell;

const END: &str = "<!-- /matrix -->";
/// Held while a test reads and writes the page.
static PAGE: Mutex<()> = Mutex::new(());

/// Compares a table of the page with `rows`, or writes `rows` to the page if
/// `STEER_WRITE_MATRIX=1`. Each reason in the table must be explained by an item of the page.
///
/// # Errors
/// When they differ, or a reason is not explained.
pub(crate) fn compare<'r>(
    name: &str,
    corner: &str,
    head: &[&str],
    rows: impl Iterator<Item = (&'r str, &'r [Cell])> + Clone,
) -> Result<()> {
    let _only = PAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/splice.md");
    let page = fs::read_to_string(&path).context("cannot read docs/splice.md")?;
    let begin = format!("<!-- matrix:{name} -->\n");
    let (before, rest) = page.split_once(&begin).with_context(|| format!("docs/splice.md lacks {begin}"))?;
    let (written, after) = rest.split_once(END).with_context(|| format!("docs/splice.md lacks {END}"))?;
    let found = table(corner, head, rows.clone());
    println!("{found}");
    if env::var_os("STEER_WRITE_MATRIX").is_some_and(|value| value == "1") {
        fs::write(&path, [before, &begin, &found, END, after].concat())
            .context("cannot write docs/splice.md")?;
    } else {
        ensure!(
            written == found,
            "docs/splice.md has another table; look at what has changed, and write it with STEER_WRITE_MATRIX=1:\n{found}"
        );
    }
    ensure!(rows.clone().all(|(_, cells)| !cells.contains(&Cell::Broken)), "streams are broken:\n{found}");
    for cell in rows.flat_map(|(_, cells)| cells) {
        let is_explained = matches!(cell, Cell::Spliced) || page.contains(&format!("\n- {cell}:"));
        ensure!(is_explained, "docs/splice.md has no item that explains {cell} of the table {name}");
    }
    Ok(())
}

fn table<'r>(corner: &str, head: &[&str], rows: impl Iterator<Item = (&'r str, &'r [Cell])>) -> String {
    let mut table = format!("| {corner} | {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len() + 1));
    for (label, cells) in rows {
        let cells: Vec<_> = cells.iter().map(Cell::to_string).collect();
        table += &format!("| {label} | {} |\n", cells.join(" | "));
    }
    table
}
