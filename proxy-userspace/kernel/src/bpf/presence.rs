//! Notes in the BPF file system that tell whether an interface is still there, in the network
//! namespace that it was in.
//!
//! A note is a pinned map of devices with one entry. The kernel takes the entry out when the
//! interface goes away, with its network namespace for example, or moves to another one. So a note
//! tells the same as a pinned link does on kernels with links, in whatever network namespace the
//! note is read. And another interface that gets the same index is not mistaken for the noted one.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytemuck::{Pod, Zeroable};

use super::links::{bpf, open};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_OBJ_PIN: libc::c_int = 6;

const BPF_MAP_TYPE_DEVMAP: u32 = 14;

/// The beginning of `union bpf_attr` of BPF_MAP_CREATE.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The same of BPF_MAP_LOOKUP_ELEM and BPF_MAP_UPDATE_ELEM.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The same of BPF_OBJ_PIN.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ToPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Notes an interface of the caller's network namespace.
///
/// # Errors
/// The interface is gone, there is such a note already, or a capability is missing (CAP_BPF,
/// CAP_NET_ADMIN).
pub(crate) fn note(ifindex: u32, pin: &Path) -> io::Result<()> {
    let size = size_of::<u32>() as u32;
    let mut create =
        Create { map_type: BPF_MAP_TYPE_DEVMAP, key_size: size, value_size: size, max_entries: 1 };
    let map = bpf(BPF_MAP_CREATE, &mut create)?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    entry(&map, BPF_MAP_UPDATE_ELEM, ifindex)?;
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut to_pin =
        ToPin { pathname: path.as_ptr() as u64, bpf_fd: map.as_raw_fd() as u32, ..ToPin::zeroed() };
    bpf(BPF_OBJ_PIN, &mut to_pin).map(drop)
}

/// Whether the noted interface still exists.
///
/// # Errors
/// There is no such note, or this process may not ask (CAP_BPF).
pub(crate) fn is_there(pin: &Path) -> io::Result<bool> {
    match entry(&open(pin)?, BPF_MAP_LOOKUP_ELEM, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        found => found.map(|ifindex| ifindex != 0),
    }
}

/// Writes or reads the only entry; returns the value of the entry after that.
fn entry(map: &OwnedFd, command: libc::c_int, mut value: u32) -> io::Result<u32> {
    let key = 0_u32;
    let mut element = Element {
        map_fd: map.as_raw_fd() as u32,
        key: (&raw const key) as u64,
        value: (&raw mut value) as u64,
        ..Element::zeroed()
    };
    bpf(command, &mut element)?;
    Ok(value)
}
