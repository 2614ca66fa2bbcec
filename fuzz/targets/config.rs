//! Configurations of every format. Each problem names a place in the file. An accepted
//! configuration can be printed, and the printed text reads as the same configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;
use steer_policy::config::{Config, LoadError, parse, to_yaml};

/// A longer text reaches no further code.
const MAX_BYTES: usize = 16 * 1024;

/// The number of lines of `text`. The text after the last line break counts as a line even if
/// empty.
fn lines(text: &str) -> usize {
    text.replace("\r\n", "\n").split(['\n', '\r']).count()
}

/// Everything that a printed configuration keeps. Two configurations mean the same if this is
/// equal.
fn meaning(config: &Config) -> String {
    let mut config = config.clone();
    config.warnings.clear();
    for listener in &mut config.listeners {
        if let [only] = &mut listener.virtual_hosts[..]
            && only.domains == ["*"]
        {
            only.name.clear();
        }
    }
    format!("{config:#?}")
}

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if text.len() > MAX_BYTES {
        return;
    }
    let lines = lines(text);
    let config = match parse(text, "file") {
        Ok(loaded) => loaded.config,
        Err(LoadError::Read { error, .. }) => panic!("read a file: {error}"),
        Err(LoadError::Invalid { problems, .. }) => {
            assert!(!problems.is_empty(), "refused without a reason");
            for problem in problems {
                assert!((1..=lines).contains(&problem.line), "of {lines} lines: {problem:?}");
                assert!(problem.column > 0 && !problem.message.is_empty(), "{problem:?}");
            }
            return;
        }
    };
    for warning in &config.warnings {
        assert!((1..=lines).contains(&warning.line), "of {lines} lines: {warning:?}");
    }
    let printed = to_yaml(&config);
    match parse(&printed, "printed") {
        Ok(again) => assert_eq!(meaning(&again.config), meaning(&config), "(again, first) by {printed}"),
        Err(error) => panic!("cannot be read again: {error}\n{printed}"),
    }
});
