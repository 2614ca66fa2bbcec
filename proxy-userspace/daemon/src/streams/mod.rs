//! The live streams: which there are (`registry`), what is known of each (`stream`), how one is shown (`row`), and the
//! source ports that they have (`ports`). What carries a stream is not known here.

mod counts;
pub mod ports;
mod registry;
mod row;
mod stream;

use strum::{IntoStaticStr, VariantArray};

pub use registry::{StreamGuard, Streams};
pub use row::Row;
pub use stream::{Carrier, Stream, StreamInfo};

/// What carries a stream: a word of `/flows`, the metrics and the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum Path {
    Relay,
    Sockmap,
    Packet,
}

/// How a stream ended: a word of the metrics and the log.
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
