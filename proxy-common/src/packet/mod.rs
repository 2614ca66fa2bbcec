//! What the packet splice's programs do to a packet, as functions over headers and a record: no
//! packet access, no maps, no helpers. The programs run them in the kernel, the tests on the host.

pub(crate) mod atomic;
pub mod checksum;
pub mod copy;
pub mod family;
pub mod headers;
pub mod icmp;
pub mod life;
pub mod offer;
pub mod options;
pub mod rewrite;
pub mod seq;
pub mod shape;
pub mod syn;

#[cfg(test)]
mod paws;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
