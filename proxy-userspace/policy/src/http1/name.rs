//! The header names that Steer itself looks at.

use strum::{IntoStaticStr, VariantArray};

/// A header name that a decision depends on. A head has its lines' names looked up once, so that
/// later look-ups compare one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case", const_into_str)]
pub enum Known {
    Connection,
    ContentLength,
    ContentType,
    Cookie,
    Date,
    Expect,
    Host,
    Http2Settings,
    KeepAlive,
    ProxyConnection,
    Server,
    SetCookie,
    Te,
    Trailer,
    TransferEncoding,
    Upgrade,
    Via,
    XEnvoyExternalAddress,
    XForwardedFor,
    XForwardedHost,
    XForwardedProto,
    XRequestId,
}

impl Known {
    /// The name that `name` spells in any case. `None`: the name is not one of these.
    pub fn of(name: &[u8]) -> Option<Self> {
        Self::of_length(name.len()).iter().copied().find(|known| known.is(name))
    }

    /// Whether `name` spells this name in any case.
    pub fn is(self, name: &[u8]) -> bool {
        self.into_str().as_bytes().eq_ignore_ascii_case(name)
    }

    const fn of_length(len: usize) -> &'static [Self] {
        match len {
            2 => &[Self::Te],
            3 => &[Self::Via],
            4 => &[Self::Host, Self::Date],
            6 => &[Self::Cookie, Self::Server, Self::Expect],
            7 => &[Self::Upgrade, Self::Trailer],
            10 => &[Self::Connection, Self::KeepAlive, Self::SetCookie],
            12 => &[Self::ContentType, Self::XRequestId],
            14 => &[Self::ContentLength, Self::Http2Settings],
            15 => &[Self::XForwardedFor],
            16 => &[Self::ProxyConnection, Self::XForwardedHost],
            17 => &[Self::TransferEncoding, Self::XForwardedProto],
            24 => &[Self::XEnvoyExternalAddress],
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_in_any_case() {
        for known in Known::VARIANTS {
            let name = known.into_str();
            assert_eq!(Known::of(name.as_bytes()), Some(*known), "{name}");
            assert_eq!(Known::of(name.to_uppercase().as_bytes()), Some(*known), "{name}");
        }
        for other in ["", "hosts", "x-forwarded-f", "x-forwarded-four", "content_length"] {
            assert_eq!(Known::of(other.as_bytes()), None, "{other}");
        }
    }
}
