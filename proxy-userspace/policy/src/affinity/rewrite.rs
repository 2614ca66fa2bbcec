//! `regex_rewrite`: RE2's `GlobalReplace`, carried out by the `regex` crate.
//!
//! RE2 and the crate both find the leftmost match, and of several matches at one place the one that
//! Perl would find. Where their syntax differs, the configuration has translated the pattern. The
//! two also differ in which empty matches count.

use std::borrow::Cow;

use regex::bytes::Captures;

use crate::config::RegexRewrite;

/// Replaces all matches that do not overlap. An empty match that touches the end of the match
/// before it is left alone: `x*` → `-` turns `abxxc` into `-a-b-c-`.
pub(super) fn replace_all<'v>(rule: &RegexRewrite, value: &'v [u8]) -> Cow<'v, [u8]> {
    let mut out = Vec::new();
    let mut copied = 0;
    let mut start = 0;
    let mut last_end = None;
    let mut replaced = false;
    while let Some(groups) = rule.pattern.captures_at(value, start) {
        let found = groups.get_match();
        if found.is_empty() && last_end == Some(found.start()) {
            if start >= value.len() {
                break;
            }
            start += width(&value[start..]);
            continue;
        }
        out.extend_from_slice(&value[copied..found.start()]);
        push_substitution(&mut out, &rule.substitution, &groups);
        replaced = true;
        copied = found.end();
        start = found.end();
        last_end = Some(found.end());
    }
    if !replaced {
        return Cow::Borrowed(value);
    }
    out.extend_from_slice(&value[copied..]);
    Cow::Owned(out)
}

/// The bytes of the first character; 1 where the bytes are not UTF-8.
fn width(bytes: &[u8]) -> usize {
    let longest = &bytes[..bytes.len().min(4)];
    longest.utf8_chunks().next().and_then(|chunk| chunk.valid().chars().next()).map_or(1, char::len_utf8)
}

/// Groups that took no part in the match are empty.
fn push_substitution(out: &mut Vec<u8>, substitution: &str, groups: &Captures<'_>) {
    let mut bytes = substitution.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => match bytes.next() {
                Some(digit @ b'0'..=b'9') => {
                    out.extend_from_slice(
                        groups.get(usize::from(digit - b'0')).map_or(&b""[..], |group| group.as_bytes()),
                    );
                }
                // `\\`. The configuration refuses anything else.
                Some(other) => out.push(other),
                None => {}
            },
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use regex::bytes::Regex;

    use super::*;

    fn replace(pattern: &str, substitution: &str, value: &str) -> String {
        let rule = RegexRewrite { pattern: Regex::new(pattern).unwrap(), substitution: substitution.into() };
        String::from_utf8(replace_all(&rule, value.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn replaces_as_re2_does() {
        for (pattern, substitution, value, expected) in [
            ("x*", "-", "abxxc", "-a-b-c-"),
            ("x*", "-", "", "-"),
            ("x*", "-", "xxxx", "-"),
            ("x*", "-", "é日x", "-é-日-"),
            ("[0-9]+", "<\\0>", "ab12cd345", "ab<12>cd<345>"),
            ("^([^,]+).*$", "\\1", "10.0.0.1, 10.0.0.2", "10.0.0.1"),
            ("^([^,]+).*$", "\\1", ",z", ",z"),
            ("(\\w+)@(\\w+)", "\\2.\\1", "a@b c@d", "b.a d.c"),
            ("b", "\\\\", "abc", "a\\c"),
            ("(a)|(b)", "[\\1\\2]", "ab", "[a][b]"),
            ("$", "!", "ab", "ab!"),
            ("(?i)abc", "z", "xABCy", "xzy"),
        ] {
            assert_eq!(replace(pattern, substitution, value), expected, "{pattern} on {value:?}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_kept() {
        let rule = RegexRewrite { pattern: Regex::new("x*").unwrap(), substitution: "-".into() };
        assert_eq!(&*replace_all(&rule, b"\xff\xc3x"), b"-\xff-\xc3-");
        let any = RegexRewrite { pattern: Regex::new(".").unwrap(), substitution: "-".into() };
        assert_eq!(&*replace_all(&any, b"a\xff\xc3\xa9"), b"-\xff-");
    }
}
