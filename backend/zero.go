package backend

import "bytes"

// IsZero reports whether p holds only zeros, as nothing does. It allocates
// nothing, and compares p with itself, one byte further, as quickly as memory
// can be compared.
func IsZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
