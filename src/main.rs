//! The binary: hands over to [`mmproxyctl::commands`], prints an error chain once, sets the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    mmproxyctl::commands::main()
}

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
