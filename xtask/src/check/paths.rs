//! Whether the files exist that a Markdown page names: in links, and in code spans such as
//! `xtask/src/main.rs`.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::exec::root;

/// The names of the top directories that have files under version control.
pub(super) fn tops() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root()).context("cannot list the repository")? {
        let entry = entry.context("cannot list the repository")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // `target` comes and goes.
        if entry.path().is_dir() && name != "target" && name != ".git" {
            names.push(name);
        }
    }
    Ok(names)
}

/// What `text`, a page in `directory`, names and is not there. Placeholders, which have a capital
/// NAME, are left alone.
pub(super) fn missing<'t>(text: &'t str, directory: &Path, tops: &[String]) -> Vec<&'t str> {
    let text_only = blocks(text);
    let links = text_only.iter().flat_map(|block| links(block)).filter(|link| !directory.join(link).exists());
    let spans = text_only.iter().flat_map(|block| spans(block)).filter(|span| {
        let is_ours = span.split_once('/').is_some_and(|(top, _)| tops.iter().any(|known| known == top));
        is_ours && !span.contains("NAME") && !root().join(span).exists()
    });
    links.chain(spans).collect()
}

/// The text between blocks of code.
fn blocks(text: &str) -> Vec<&str> {
    text.split("\n```").step_by(2).collect()
}

/// The relative targets of links, without what comes after `#`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    targets
        .map(|(target, _)| target.split_once('#').map_or(target, |(file, _)| file))
        .filter(|file| !file.is_empty() && !file.contains("://"))
}

/// Code spans of one word.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|span| !span.contains(char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_glossary_are_in_the_files_that_it_names() {
        let page = include_str!("../../../docs/glossary.md");
        let mut count = 0;
        for row in page.lines().filter(|line| line.starts_with("| ") && line.ends_with("` |")) {
            let cell = row.trim_end_matches(" |").rsplit("| ").next().unwrap();
            let [word, file] = spans(cell).collect::<Vec<_>>()[..] else { panic!("{cell:?}") };
            let code = fs::read_to_string(root().join(file)).unwrap();
            let mut identifiers = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(identifiers.any(|found| found == word), "{file} has no {word}");
            count += 1;
        }
        assert!(count > 40, "{count} words");
    }

    #[test]
    fn what_is_named_and_not_there_is_found() {
        let page = "See [a](README.md#x), [b](gone.md), [c](https://example.com/y), [d](#here), `xtask/src/main.rs`,\n\
                    `xtask/src/gone.rs`, `xtask/src/NAME.rs`, `other/gone.rs` and `xtask/src/gone.rs now`.\n\
                    ```\n`xtask/src/no.rs`\n```\nLast: `docs/gone.md`.\n";
        let tops = tops().unwrap();
        assert!(tops.iter().any(|top| top == "proxy-userspace"), "{tops:?}");
        assert_eq!(missing(page, &root(), &tops), ["gone.md", "xtask/src/gone.rs", "docs/gone.md"]);
    }
}
