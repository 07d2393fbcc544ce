package sandbox

import "golang.org/x/sys/unix"

const (
	auditArch    = unix.AUDIT_ARCH_X86_64
	firstForeign = 0x40000000 // __X32_SYSCALL_BIT
)

// legacyConfine are calls that newer architectures do not have.
func legacyConfine() []rule {
	return append(all(unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT,
		unix.SYS_MKNOD, unix.SYS_SYMLINK, unix.SYS_LINK, unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_USELIB),
		rule{nr: unix.SYS_OPEN, test: ifBit, arg: 2, value: setID},
		rule{nr: unix.SYS_CREAT, test: ifBit, arg: 1, value: setID})
}

func legacySeal() []rule {
	return all(unix.SYS_OPEN, unix.SYS_CREAT, unix.SYS_UNLINK, unix.SYS_RENAME, unix.SYS_MKDIR, unix.SYS_RMDIR,
		unix.SYS_UTIME, unix.SYS_UTIMES, unix.SYS_FUTIMESAT, unix.SYS_READLINK, unix.SYS_ACCESS, unix.SYS_GETDENTS)
}
