//go:build !linux || (!amd64 && !arm64)

package sandbox

import "errors"

const (
	auditArch    = 0
	firstForeign = 0xffffffff
)

func legacyConfine() []rule { return nil }
func legacySeal() []rule    { return nil }

func install([]rule) error { return errors.New("seccomp filter: not for this architecture") }
