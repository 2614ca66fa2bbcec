//! Whether docs/architecture.md is right about the crates and their modules: what each of them
//! uses, and whether it may have unsafe code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::exec::root;

const PAGE: &str = include_str!("../../../docs/architecture.md");

/// A row of the table of packages.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    /// The packages of the workspace that it uses, and aya and tokio if it does; what only its
    /// tests use is left out.
    uses: BTreeSet<String>,
    has_unsafe: bool,
}

/// The cells of the rows that follow the table's head, whose first cell is `head`, without
/// backticks.
fn rows(head: &str) -> Vec<Vec<String>> {
    let start = PAGE.find(&format!("\n| {head} |")).expect("the table is there");
    let lines = PAGE[start..].lines().skip(3).take_while(|line| line.starts_with('|'));
    let cells = |line: &str| {
        line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect::<Vec<_>>()
    };
    lines.map(cells).collect()
}

fn names(cell: &str) -> Vec<String> {
    cell.split(", ").filter(|name| *name != "-").map(str::to_owned).collect()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found
}

/// Whether a line of code (comments aside) begins an unsafe block, function, trait or
/// implementation.
fn has_unsafe(text: &str) -> bool {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).any(|line| {
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"]
            .iter()
            .any(|start| line.contains(start))
    })
}

#[test]
fn packages_use_what_the_page_says() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeSet<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    let actual: BTreeSet<Package> = packages
        .iter()
        .map(|package| {
            let uses = package["dependencies"].as_array().unwrap().iter();
            let uses = uses
                .filter(|dependency| dependency["kind"].is_null())
                .map(|dependency| dependency["name"].as_str().unwrap())
                .filter(|name| ours.contains(name) || ["aya", "tokio"].contains(name));
            let folder = Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("src");
            let has_unsafe =
                sources(&folder).iter().any(|file| has_unsafe(&fs::read_to_string(file).unwrap()));
            Package {
                name: package["name"].as_str().unwrap().to_owned(),
                uses: uses.map(str::to_owned).collect(),
                has_unsafe,
            }
        })
        .collect();
    let written: BTreeSet<Package> = rows("package")
        .iter()
        .map(|row| Package {
            name: row[0].clone(),
            uses: names(&row[1]).into_iter().collect(),
            has_unsafe: row[2] == "yes",
        })
        .collect();
    assert_eq!(written, actual, "(docs/architecture.md, what is there)");
}

#[test]
fn no_module_uses_one_that_stands_above_it() {
    for row in rows("modules of") {
        let source = root().join(&row[1]);
        let floors = names(&row[2]);
        let mut found = BTreeSet::new();
        for file in sources(&source) {
            let inside = file.strip_prefix(&source).unwrap();
            let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
            if ["lib", "main"].contains(&module) {
                continue;
            }
            found.insert(module.to_owned());
            let floor = floors.iter().position(|name| name == module);
            let floor =
                floor.unwrap_or_else(|| panic!("docs/architecture.md does not have {module} of {}", row[0]));
            let text = fs::read_to_string(&file).unwrap();
            for rest in text.split("crate::").skip(1) {
                let used: String =
                    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                let above = floors.iter().position(|name| *name == used).is_some_and(|used| used < floor);
                assert!(!above, "{}: uses {used}, which stands above {module}", file.display());
            }
        }
        let listed: BTreeSet<String> = floors.into_iter().collect();
        assert_eq!(listed, found, "the modules of {}", row[0]);
    }
}

#[test]
fn unsafe_code_is_told_from_talk_of_it() {
    assert!(has_unsafe("let a = unsafe { b() };") && has_unsafe("unsafe impl Send for A {}"));
    assert!(!has_unsafe("#![forbid(unsafe_code)]\n// no unsafe { } here"));
}
