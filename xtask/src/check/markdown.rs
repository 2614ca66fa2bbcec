//! The form of the Markdown files: no line of text is longer than [`COLUMNS`], and every file that
//! a page names exists.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::paths;
use crate::exec::root;

/// The longest line, in characters. Longer lines are hard to review, since a diff shows whole
/// lines.
const COLUMNS: usize = 120;

/// Checks the Markdown files at the top of the repository and below `docs/`.
///
/// # Errors
///
/// If a line is too long, with file and line of each; if a file that a page names is not there; or
/// if a page cannot be read.
pub(super) fn check() -> Result<()> {
    let mut faults = Vec::new();
    let tops = paths::tops()?;
    for file in files()? {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(root()).unwrap_or(&file).display().to_string();
        let too_long =
            too_long(&text).map(|line| format!("{name}:{line}: longer than {COLUMNS} columns; break it"));
        faults.extend(too_long);
        let directory = file.parent().unwrap_or(&file);
        let missing = paths::missing(&text, directory, &tops);
        faults.extend(missing.iter().map(|path| format!("{name}: names {path}, which does not exist")));
    }
    if !faults.is_empty() {
        bail!("{}\n(Tables and code blocks may be wider.)", faults.join("\n"));
    }
    Ok(())
}

/// The numbers, from 1, of the lines that are too long. Rows of tables, code blocks, and what the
/// benchmark writes between its marks are left alone.
fn too_long(text: &str) -> impl Iterator<Item = usize> {
    let (mut in_code, mut is_written) = (false, false);
    text.lines().zip(1..).filter_map(move |(line, number)| {
        let content = line.trim_start();
        in_code ^= content.starts_with("```");
        is_written = content.starts_with("<!-- bench:") || (is_written && content != "<!-- /bench -->");
        let is_exempt = in_code || is_written || content.starts_with('|');
        (!is_exempt && line.chars().count() > COLUMNS).then_some(number)
    })
}

fn files() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![root().join("docs")];
    collect(&root(), &mut found, &mut Vec::new())?;
    while let Some(directory) = open.pop() {
        collect(&directory, &mut found, &mut open)?;
    }
    found.sort();
    Ok(found)
}

/// Adds the Markdown files of `directory` to `files`, and the directories in it to `directories`.
fn collect(directory: &Path, files: &mut Vec<PathBuf>, directories: &mut Vec<PathBuf>) -> Result<()> {
    let cannot_list = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(cannot_list)? {
        let path = entry.with_context(cannot_list)?.path();
        if path.is_dir() {
            directories.push(path);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_is_too_long() {
        let (fits, wide) = ("x".repeat(COLUMNS), "ü".repeat(COLUMNS + 1));
        let text = format!(
            "{fits}\n{wide}\n| {wide} |\n```\n{wide}\n```\n- {fits}\n<!-- bench:cpu -->\n{wide}\n<!-- /bench -->\n{wide}\n"
        );
        assert_eq!(too_long(&text).collect::<Vec<_>>(), [2, 7, 11]);
    }

    #[test]
    fn the_pages_have_the_form_and_name_only_what_exists() {
        check().unwrap();
    }

    #[test]
    fn the_pages_are_found() {
        let found = files().unwrap();
        for name in ["README.md", "docs/splice.md"] {
            assert!(found.contains(&root().join(name)), "{name} is not among {found:?}");
        }
    }
}
