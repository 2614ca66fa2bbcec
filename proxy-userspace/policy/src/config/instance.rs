//! The key `instance`.

use proxy_common::instance::{Instance, InvalidInstance};

use super::reader::Field;

pub(super) fn read(field: &Field<'_>) -> Option<Instance> {
    let read = field.string()?.parse();
    read.map_err(|error: InvalidInstance| field.error(error, "write a name such as `edge-1`")).ok()
}
