//! What carries a stream, and how it ended: the words of `/flows`, the metrics and the log.

use strum::{IntoStaticStr, VariantArray};

/// What carries a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Path {
    Relay,
    Sockmap,
    Packet,
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum End {
    /// Both directions were finished by FIN.
    Finished,
    /// One side reset, or vanished; the other was reset too.
    Reset,
    IdleTimeout,
    /// A packet of it came that the packet splice cannot carry; both sides were reset.
    NotCarried,
}
