//! What carries a stream, and how it ended: the words of `/flows`, the metrics and the log.

/// What carries a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    Relay,
    Sockmap,
    Packet,
}

impl Path {
    pub const ALL: [Self; 3] = [Self::Relay, Self::Sockmap, Self::Packet];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Sockmap => "sockmap",
            Self::Packet => "packet",
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Both directions were finished by FIN.
    Finished,
    /// One side reset, or vanished; the other was reset too.
    Reset,
    IdleTimeout,
    /// A packet of it came that the packet splice cannot carry; both sides were reset.
    NotCarried,
}

impl End {
    pub const ALL: [Self; 4] = [Self::Finished, Self::Reset, Self::IdleTimeout, Self::NotCarried];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Reset => "reset",
            Self::IdleTimeout => "idle_timeout",
            Self::NotCarried => "not_carried",
        }
    }
}
