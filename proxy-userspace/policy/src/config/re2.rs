//! Envoy's regexes are RE2's. The `regex` crate shares RE2's syntax and its guarantee of linear
//! time, but reads a few forms differently. This module rewrites a pattern so that both agree, or
//! refuses the pattern:
//!
//! - `\d \s \w \b` and their negations are ASCII in RE2 (and `\s` lacks the vertical tab):
//!   rewritten;
//! - `[a&&b]`, `[a--b]`, `[a~~b]` and `[a[b]]` are plain characters in RE2: refused, escape them;
//! - `(?x)`, `(?u)`, `(?R)` and `\b{start}` and its kin are unknown to RE2: refused;
//! - `\Q…\E`, `\C` and octal escapes are known to RE2 only: refused by the crate.
//!
//! As in RE2, `.` and classes match whole characters of UTF-8.

use regex::bytes::Regex;
use regex_syntax::ast::{self, Ast, Visitor, parse::Parser};

/// Compiles a pattern written for RE2.
pub(super) fn compile(pattern: &str) -> Result<Regex, String> {
    let tree = Parser::new().parse(pattern).map_err(|error| error.kind().to_string())?;
    let rewrites = ast::visit(&tree, Differences(Vec::new())).map_err(str::to_owned)?;
    let mut rewritten = String::with_capacity(pattern.len());
    let mut copied = 0;
    for (span, text) in rewrites {
        rewritten.push_str(&pattern[copied..span.start.offset]);
        rewritten.push_str(text);
        copied = span.end.offset;
    }
    rewritten.push_str(&pattern[copied..]);
    Regex::new(&rewritten).map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "it is too big".to_owned(),
        other => other.to_string().lines().last().unwrap_or_default().replace("error: ", ""),
    })
}

/// A pattern that [`compile`] turns into an equal regex.
pub(super) fn source(compiled: &Regex) -> String {
    // Nothing else can have written `(?-u:`, which `compile` refuses.
    compiled.as_str().replace(r"(?-u:\b)", r"\b").replace(r"(?-u:\B)", r"\B")
}

/// The substitution's groups must exist: RE2 refuses `\2` for a pattern with one group.
pub(super) fn check_substitution(pattern: &Regex, substitution: &str) -> Result<(), String> {
    let groups = pattern.captures_len() - 1;
    let mut chars = substitution.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            continue;
        }
        match chars.next() {
            Some('\\') => {}
            Some(digit @ '0'..='9') if (digit as usize - '0' as usize) <= groups => {}
            Some(digit @ '0'..='9') => {
                return Err(format!("\\{digit} names a group, but the pattern has {groups}"));
            }
            _ => return Err("a backslash must be followed by a digit or another backslash".to_owned()),
        }
    }
    Ok(())
}

/// Collects the parts of the pattern that must be rewritten, in order.
struct Differences(Vec<(ast::Span, &'static str)>);

const CLASS_WITHIN: &str = "a class inside a class means something else to RE2; escape `[`, `&`, `-` and `~`";
const FLAG: &str = "RE2 knows only the flags i, m, s and U";

impl Differences {
    fn class(&mut self, class: &ast::ClassPerl) {
        let text = match (&class.kind, class.negated) {
            (ast::ClassPerlKind::Digit, false) => "[0-9]",
            (ast::ClassPerlKind::Digit, true) => "[^0-9]",
            (ast::ClassPerlKind::Space, false) => r"[\t\n\f\r ]",
            (ast::ClassPerlKind::Space, true) => r"[^\t\n\f\r ]",
            (ast::ClassPerlKind::Word, false) => "[0-9A-Za-z_]",
            (ast::ClassPerlKind::Word, true) => "[^0-9A-Za-z_]",
        };
        self.0.push((class.span, text));
    }

    /// As [`Self::class`], within brackets: ranges only, since [`source`] must be readable again.
    fn class_in_brackets(&mut self, class: &ast::ClassPerl) {
        let text = match (&class.kind, class.negated) {
            (ast::ClassPerlKind::Digit, false) => "0-9",
            (ast::ClassPerlKind::Digit, true) => r"\x00-/:-\x{10FFFF}",
            (ast::ClassPerlKind::Space, false) => r"\t\n\f\r ",
            (ast::ClassPerlKind::Space, true) => r"\x00-\x08\x0B\x0E-\x1F!-\x{10FFFF}",
            (ast::ClassPerlKind::Word, false) => "0-9A-Za-z_",
            (ast::ClassPerlKind::Word, true) => r"\x00-/:-@\[-\^`\{-\x{10FFFF}",
        };
        self.0.push((class.span, text));
    }

    fn flags(flags: &ast::Flags) -> Result<(), &'static str> {
        let known = |item: &ast::FlagsItem| {
            !matches!(
                item.kind,
                ast::FlagsItemKind::Flag(ast::Flag::Unicode | ast::Flag::CRLF | ast::Flag::IgnoreWhitespace)
            )
        };
        if flags.items.iter().all(known) { Ok(()) } else { Err(FLAG) }
    }
}

impl Visitor for Differences {
    type Output = Vec<(ast::Span, &'static str)>;
    type Err = &'static str;

    fn finish(self) -> Result<Self::Output, Self::Err> {
        Ok(self.0)
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), Self::Err> {
        match ast {
            Ast::ClassPerl(class) => self.class(class),
            Ast::Flags(set) => Self::flags(&set.flags)?,
            Ast::Group(group) => {
                if let ast::GroupKind::NonCapturing(flags) = &group.kind {
                    Self::flags(flags)?;
                }
            }
            Ast::Assertion(assertion) => match assertion.kind {
                ast::AssertionKind::WordBoundary => self.0.push((assertion.span, r"(?-u:\b)")),
                ast::AssertionKind::NotWordBoundary => self.0.push((assertion.span, r"(?-u:\B)")),
                ast::AssertionKind::StartLine
                | ast::AssertionKind::EndLine
                | ast::AssertionKind::StartText
                | ast::AssertionKind::EndText => {}
                _ => return Err("RE2 knows only the word boundaries \\b and \\B"),
            },
            _ => {}
        }
        Ok(())
    }

    fn visit_class_set_item_pre(&mut self, item: &ast::ClassSetItem) -> Result<(), Self::Err> {
        match item {
            ast::ClassSetItem::Perl(class) => self.class_in_brackets(class),
            ast::ClassSetItem::Bracketed(_) => return Err(CLASS_WITHIN),
            _ => {}
        }
        Ok(())
    }

    fn visit_class_set_binary_op_pre(&mut self, _: &ast::ClassSetBinaryOp) -> Result<(), Self::Err> {
        Err(CLASS_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_ascii_and_dots_are_characters() {
        let rows = [
            (r"\w+", "éa1_ü", "é<>ü"),
            (r"\W", "aé-", "a<><>"),
            (r"\d", "1٣", "<>٣"),
            (r"[\w.]+", "a.b é", "<> é"),
            (r"[^\s]", "a b", "<> <>"),
            (r"\s", "a\u{b}b c", "a\u{b}b<>c"),
            (r"[\W]", "aé-^_[`{", "a<><><>_<><><>"),
            (r"[\D]", "1a٣/:", "1<><><><>"),
            (r"[\S]", "a\u{b} !\u{e}", "<><> <><>"),
            (r"\bé", "aé é", "a<> é"),
            (r".", "é日", "<><>"),
            (r"(?i)straße", "STRASSE Straße", "STRASSE <>"),
        ];
        for (pattern, text, want) in rows {
            let compiled = compile(pattern).unwrap();
            let got = compiled.replace_all(text.as_bytes(), &b"<>"[..]).into_owned();
            assert_eq!(String::from_utf8(got).unwrap(), want, "{pattern} on {text}");
            assert_eq!(compile(&source(&compiled)).unwrap().as_str(), compiled.as_str(), "{pattern}");
        }
    }

    #[test]
    fn what_re2_reads_otherwise_is_refused() {
        for pattern in [
            "[a&&b]",
            "[a[b]c]",
            "[a--b]",
            "(?x)a",
            "(?u:a)",
            r"\b{start}",
            r"\<a",
            "(",
            r"(a)\1",
            "a{2,1}",
            "*",
            r"\Qa\E",
        ] {
            assert!(compile(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn substitutions_name_groups_that_exist() {
        let one_group = compile("(a)b").unwrap();
        for (substitution, good) in
            [(r"\1-\0", true), (r"\\", true), ("$2", true), (r"\2", false), (r"\n", false), ("\\", false)]
        {
            assert_eq!(check_substitution(&one_group, substitution).is_ok(), good, "{substitution}");
        }
    }
}
