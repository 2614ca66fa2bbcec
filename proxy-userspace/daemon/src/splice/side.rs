//! The two sides of a stream, and arrays with one element for each side.

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

    /// The side to which the bytes from this side go.
    pub(super) const fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }

    /// The direction of the bytes from this side.
    pub(super) const fn direction(self) -> Direction {
        match self {
            Self::Downstream => Direction::ToUpstream,
            Self::Upstream => Direction::ToDownstream,
        }
    }
}

/// Arrays by side have downstream first. Arrays by direction have the direction from downstream
/// first, so a side is also the index of the direction of its bytes.
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
