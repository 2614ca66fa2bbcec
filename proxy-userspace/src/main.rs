//! `steer`: see [`steer::cli`].

fn main() -> std::process::ExitCode {
    steer::cli::main()
}
