//! Damaged files: whatever they have become, reading them neither panics nor lets through a
//! configuration that breaks the promises of its types.

use proptest::prelude::*;

use super::super::{LoadError, parse, to_yaml};
use super::{ENVOY_V1, ENVOY_V3, EVERY_KEY};

/// Pieces that tend to change the structure or the type of what they hit.
const SPLINTERS: [&str; 22] = [
    "",
    "\n",
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "'",
    "&a ",
    "*a",
    "~",
    "0",
    "-1",
    "\u{e9}",
    "\t",
    "99999999999999999999",
    "!!str ",
    "!ignore ",
    "{ value: ",
    "\\",
];

#[derive(Debug, Clone)]
struct Damage {
    at: prop::sample::Index,
    removed: usize,
    put: prop::sample::Index,
}

fn damage() -> impl Strategy<Value = Damage> {
    (any::<prop::sample::Index>(), 0..12usize, any::<prop::sample::Index>())
        .prop_map(|(at, removed, put)| Damage { at, removed, put })
}

fn apply(text: &str, damages: &[Damage]) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    for damage in damages {
        let at = damage.at.index(chars.len());
        let end = (at + damage.removed).min(chars.len());
        chars.splice(at..end, damage.put.get(&SPLINTERS).chars());
        if chars.is_empty() {
            break;
        }
    }
    chars.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn damaged_files_are_refused_or_consistent(
        which in 0..3usize,
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let text = apply([EVERY_KEY, ENVOY_V3, ENVOY_V1][which], &damages);
        match parse(&text, "file") {
            Err(LoadError::Invalid { problems, .. }) => {
                prop_assert!(!problems.is_empty());
                for problem in problems {
                    prop_assert!(problem.line > 0 && problem.column > 0);
                    prop_assert!(!problem.message.contains("cannot be read as a configuration"), "{}", text);
                }
            }
            Err(error) => prop_assert!(false, "{}", error),
            Ok(loaded) => {
                let config = loaded.config;
                for host in config.listeners.iter().flat_map(|listener| &listener.virtual_hosts) {
                    prop_assert!(host.routes.iter().all(|route| config.clusters.iter().any(|cluster| cluster.name == route.cluster)));
                    prop_assert!(!host.domains.is_empty());
                }
                let printed = to_yaml(&config);
                let again = parse(&printed, "printed").map(|loaded| to_yaml(&loaded.config));
                prop_assert_eq!(again.map_err(|error| error.to_string()), Ok(printed));
            }
        }
    }
}
