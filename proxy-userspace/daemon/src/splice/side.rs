//! The two sides of a stream, and arrays with an element for each.

use std::ops::{Index, IndexMut};

use proxy_common::flow::Direction;

/// A side of a stream: the client's or the endpoint's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Downstream = 0,
    Upstream = 1,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::Downstream, Self::Upstream];

    /// The side at which what comes from this one leaves.
    pub(super) const fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }

    /// The direction of what comes from this side.
    pub(super) const fn direction(self) -> Direction {
        match self {
            Self::Downstream => Direction::ToUpstream,
            Self::Upstream => Direction::ToDownstream,
        }
    }
}

/// Arrays by side have downstream first, and so have those by direction: the element of a side is that of what comes from it.
impl<T> Index<Side> for [T; 2] {
    type Output = T;

    fn index(&self, side: Side) -> &T {
        &self[side as usize]
    }
}

impl<T> IndexMut<Side> for [T; 2] {
    fn index_mut(&mut self, side: Side) -> &mut T {
        &mut self[side as usize]
    }
}
