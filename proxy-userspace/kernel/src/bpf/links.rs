//! What aya does not tell of links, or only with CAP_SYS_ADMIN: whether a pinned link is still
//! attached to an interface, and which links an interface has.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::programs::TcAttachType;
use bytemuck::{Pod, Zeroable};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;

/// `enum bpf_attach_type`.
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// How many links of an interface are asked for. The kernel allows no more (BPF_MPROG_MAX).
const MOST: usize = 64;

/// `union bpf_attr` of BPF_OBJ_GET.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Get {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The same of BPF_OBJ_GET_INFO_BY_FD.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The same of BPF_PROG_QUERY.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    _pad: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// The beginning of `struct bpf_link_info`, of a tcx link.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TcxInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    ifindex: u32,
    attach_type: u32,
}

/// Whether the tcx link that is pinned here is attached. A link is detached when its interface goes
/// away, for example with its network namespace.
///
/// # Errors
/// There is no link, or this process may not ask. That needs CAP_BPF, not CAP_SYS_ADMIN.
pub(crate) fn is_attached(pin: &Path) -> io::Result<bool> {
    info(pin).map(|info| info.ifindex != 0)
}

/// The kernel's number of the tcx link that is pinned here.
///
/// # Errors
/// As for [`is_attached`].
pub(crate) fn id(pin: &Path) -> io::Result<u32> {
    info(pin).map(|info| info.id)
}

/// The numbers of the tcx links that an interface of the caller's network namespace has in this
/// direction.
///
/// # Errors
/// There is no such interface, or this process may not ask (CAP_NET_ADMIN).
pub(crate) fn attached_to(ifindex: u32, direction: TcAttachType) -> io::Result<Vec<u32>> {
    let attach_type =
        if matches!(direction, TcAttachType::Ingress) { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS };
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut query = Query {
        target: ifindex,
        attach_type,
        programs: programs.as_mut_ptr() as u64,
        count: MOST as u32,
        links: links.as_mut_ptr() as u64,
        ..Query::zeroed()
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    Ok(links.iter().copied().take(query.count as usize).collect())
}

/// What is pinned here.
///
/// # Errors
/// Nothing is, or this process may not use it.
pub(crate) fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut get = Get { pathname: path.as_ptr() as u64, ..Get::zeroed() };
    let opened = bpf(BPF_OBJ_GET, &mut get)?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

fn info(pin: &Path) -> io::Result<TcxInfo> {
    let link = open(pin)?;
    let mut info = TcxInfo::zeroed();
    let mut get_info = GetInfo {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<TcxInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut get_info)?;
    Ok(info)
}

/// Calls bpf(2). Whatever the attributes point to must live until the call returns.
///
/// # Errors
/// Those of the command.
pub(crate) fn bpf(command: libc::c_int, attributes: &mut impl Pod) -> io::Result<libc::c_int> {
    let (at, len): (*mut _, _) = (attributes, size_of_val(attributes));
    // SAFETY: the attributes are a local of that size, and what they refer to lives as long as the
    // caller's call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, at, len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}
