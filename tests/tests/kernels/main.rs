//! Steer on stock kernels, in QEMU. The guest runs `steer-guest` of this package and reports its
//! findings. This test judges the findings.
//!
//! The short form tries the kernels of two of Debian's suites. The long form tries all kernels,
//! with the socket splice and with deaths of the process, and compares the findings with the table
//! of docs/kernels.md.

mod boot;
mod initramfs;
mod judge;
mod page;
mod wire;

use std::time::Instant;

use steer_tests::kernels;
use steer_tests::require;

use crate::boot::Guest;
use crate::judge::Found;

#[test]
fn steer_runs_on_stock_kernels() {
    let Some(directory) = kernels::directory() else { return };
    let long = require::long();
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for kernel in kernels::of_form(long) {
        let (begin, name) = (Instant::now(), kernel.name());
        let findings =
            Guest::boot(&directory, kernel, kernel.phases(long), None, &[]).and_then(Guest::finish);
        let findings = findings.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        println!("{name}: {:.0} s", begin.elapsed().as_secs_f64());
        findings.iter().for_each(|finding| println!("    {finding}"));
        let found = Found::new(kernel, &findings);
        let mut faults = [found.check(), found.check_carried("auto")].concat();
        if long {
            faults.extend(found.check_killed());
            if kernel.tries_sockmap {
                faults.extend(found.check_carried("sockmap"));
            }
            rows.push(found.row());
        }
        wrong.extend(faults.into_iter().map(|fault| format!("{name}: {fault}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    if long && std::env::var_os(kernels::ONLY).is_none() {
        page::compare(&rows).unwrap();
    }
}
