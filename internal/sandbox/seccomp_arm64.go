package sandbox

import "golang.org/x/sys/unix"

const (
	auditArch    = unix.AUDIT_ARCH_AARCH64
	firstForeign = 0xffffffff // there are none
)

func legacyConfine() []rule { return all(unix.SYS_KEXEC_FILE_LOAD) }

func legacySeal() []rule { return nil }
