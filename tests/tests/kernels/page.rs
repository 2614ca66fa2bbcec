//! The table of docs/kernels.md, which holds the findings of the long form.

use std::path::Path;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use steer_tests::kernels::UBUNTU_MIRROR;

const BEGIN: &str = "<!-- The table below is written by the suite kernels. -->\n";
const END: &str = "<!-- End of the table. -->\n";
const HEAD: [&str; 9] = [
    "Linux",
    "from",
    "`splice: auto`",
    "attached by",
    "`splice: sockmap`",
    "`kill -9`: streams",
    "the next process",
    "left by a stop",
    "left after `kill -9`, a start and a stop",
];

/// Compares the page's table with `rows`, or writes `rows` to the page if `STEER_KERNELS_WRITE=1`.
///
/// # Errors
/// When they differ.
pub(crate) fn compare(rows: &[String]) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
    let page = fs::read_to_string(&path).context("cannot read docs/kernels.md")?;
    let (before, rest) =
        page.split_once(BEGIN).context("docs/kernels.md does not have the line that begins its table")?;
    let (written, after) =
        rest.split_once(END).context("docs/kernels.md does not have the line that ends its table")?;
    let line = |cells: &[&str]| format!("| {} |\n", cells.join(" | "));
    let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let found = format!("\n{}{}{rows}\n", line(&HEAD), "|---".repeat(HEAD.len()) + "|\n");
    println!("{found}");
    if env::var_os("STEER_KERNELS_WRITE").is_some_and(|value| value == "1") {
        let page = [before, BEGIN, &found, END, after].concat();
        return fs::write(&path, page).context("cannot write docs/kernels.md");
    }
    let is_had = |line: &&str| env::var_os(UBUNTU_MIRROR).is_some() || !line.contains("| Ubuntu ");
    let written: String = written.lines().filter(is_had).flat_map(|line| [line, "\n"]).collect();
    ensure!(
        written == found,
        "docs/kernels.md has another table; look at what has changed, and write it with STEER_KERNELS_WRITE=1:\n{written}"
    );
    Ok(())
}
