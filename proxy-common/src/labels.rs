//! Enums whose values are in maps and metrics.

/// An enum with stable numbers and labels, `ALL`, `number` and `as_str`.
macro_rules! labelled {
    (
        $(#[$attribute:meta])*
        pub enum $type:ident {
            $($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal;)+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum $type {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl $type {
            /// All variants in the order of their numbers, without gaps.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The number of this variant, the same in every build.
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// The metric label and log value.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)+
                }
            }
        }
    };
}

pub(crate) use labelled;

/// Checks that numbers go up by one from `first`, and that each label is well formed, unique, and
/// explained in docs/splice.md, in a table with the rows in the same order.
#[cfg(test)]
pub(crate) fn check(all: &[(u32, &str)], first: u32, section: &str) {
    for (index, (number, label)) in all.iter().enumerate() {
        // A new one goes to the end; a number is never given to another one.
        assert_eq!(*number as usize, index + first as usize, "{label}");
        assert!(label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{label}");
    }
    let labels: Vec<_> = all.iter().map(|(_, label)| *label).collect();
    let page = include_str!("../../docs/splice.md");
    let section = page.split("\n## ").find(|text| text.starts_with(section)).expect("docs/splice.md has it");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let explained: Vec<_> = rows.map(|(label, _)| label).collect();
    assert_eq!(explained, labels, "the rows of `{section}` in docs/splice.md");
}
